"""The committed demo backbone: small, described by its metadata, and loadable from the metadata alone.

Shape suffixes: B images, C channels, H rows, W columns, D features.
"""

import json
import subprocess
import sys
from pathlib import Path

# Must come before timm: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # isort: skip

import pytest
import timm
import torch
from safetensors import safe_open

ASSET = Path(spt_dist.__file__).parent / "assets" / "demo_vit.safetensors"
METADATA_KEYS = {
    "recipe",
    "seed",
    "model_name",
    "model_kwargs",
    "mean",
    "std",
    "num_classes_pretraining",
    "num_images_per_epoch",
    "num_epochs",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "heldout_accuracy",
    "heldout_images",
    "torch_version",
    "timm_version",
    "numpy_version",
}


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safe_open(ASSET, framework="pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    with safe_open(ASSET, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def test_asset_is_small() -> None:
    assert ASSET.stat().st_size <= 4_000_000


def test_metadata_is_complete(metadata: dict[str, str]) -> None:
    assert set(metadata) >= METADATA_KEYS
    assert all(metadata[key] for key in METADATA_KEYS)
    assert json.loads(metadata["mean"]) == [0.5, 0.5, 0.5]
    assert json.loads(metadata["std"]) == [0.5, 0.5, 0.5]
    assert "num_classes" not in json.loads(metadata["model_kwargs"])


def test_pretraining_learned_something(metadata: dict[str, str]) -> None:
    chance = 1.0 / int(metadata["num_classes_pretraining"])
    assert 10 * chance < float(metadata["heldout_accuracy"]) <= 1.0


def test_asset_is_a_finite_float32_backbone(tensors: dict[str, torch.Tensor]) -> None:
    assert not [name for name in tensors if name.startswith("head.")]
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_loads_strictly_into_the_described_model(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    kwargs = json.loads(metadata["model_kwargs"])
    model = timm.create_model(metadata["model_name"], num_classes=0, **kwargs).eval()
    model.load_state_dict(tensors, strict=True)
    images_BCHW = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"])
    with torch.no_grad():
        features_BD = model(images_BCHW)
    assert features_BD.shape == (2, kwargs["embed_dim"])
    assert bool(torch.isfinite(features_BD).all())


def test_the_recipe_runs_and_repeats(tmp_path: Path) -> None:
    """A tiny run of the committed script, twice: the same bytes, with the asset's keys."""
    script = Path(__file__).parents[2] / "tools" / "make_demo_backbone.py"
    contents = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.safetensors"
        command = [sys.executable, str(script), "--output", str(path), "--images", "256", "--epochs", "1"]
        subprocess.run([*command, "--heldout-images", "64"], check=True, capture_output=True, timeout=120)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    with safe_open(tmp_path / "first.safetensors", "pt") as made, safe_open(ASSET, "pt") as asset:
        assert made.keys() == asset.keys()
        assert made.metadata().keys() == asset.metadata().keys()
