"""Folders that timm loads by itself."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Must come before timm: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # noqa: F401  # isort: skip

import pytest
import timm
import timm.data
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from spt_dist import UserError, inject, merge, trainable_parameters
from spt_dist.models.checkpoints import load_merged
from spt_dist.tuning.export import hub
from spt_dist.tuning.export.hub import CONFIG_FILE, WEIGHTS_FILE, save_pretrained
from spt_dist.tuning.export.peft import save_peft
from tests.models_for_tests import make_vit
from tests.tuning.plans_for_tests import disturb, make_model, random_plan

# What a model is, and the shape of its images.
BUILDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit": (make_vit, (3, 16, 16)),
    "grey images": (lambda: make_vit(in_chans=1), (1, 16, 16)),
    "averages, no class token": (lambda: make_vit(global_pool="avg", class_token=False), (3, 16, 16)),
    "norm by name, oblong": (lambda: make_vit(norm_layer="layernorm", img_size=(16, 24)), (3, 16, 24)),
    "registers, layer scale": (lambda: make_model("registers, layer scale"), (3, 16, 16)),
    "windows": (lambda: make_model("windows"), (3, 56, 56)),
    "convolutions": (lambda: make_model("convolutions"), (3, 224, 224)),
    "two heads": (lambda: make_distilled(), (3, 32, 32)),
    "another head": (lambda: with_classes(make_vit(), 3), (3, 16, 16)),
}


def make_distilled() -> nn.Module:
    """A small DeiT with its distillation token and head."""
    kwargs = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("deit_tiny_distilled_patch16_224", **kwargs).eval()


def with_classes(model: nn.Module, num_classes: int) -> nn.Module:
    """The model with another head, as loading a task file gives it one."""
    model.reset_classifier(num_classes)
    return model


def make_tuned(build: Callable[[], nn.Module] = make_vit) -> nn.Module:
    """A model with a random plan, trained a little."""
    model = build()
    tuned = inject(model, random_plan(model, 1))
    disturb(tuned)
    return tuned


@pytest.mark.parametrize("kind", BUILDS)
def test_timm_loads_the_folder(kind: str, tmp_path: Path) -> None:
    build, shape = BUILDS[kind]
    tuned = make_tuned(build)
    merged = merge(tuned)
    save_pretrained(tuned, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, *shape)
    assert torch.equal(loaded(images), merged(images))
    assert not torch.allclose(loaded(images), build()(images), atol=0.01)
    assert loaded.pretrained_cfg["input_size"] == shape
    assert loaded.state_dict().keys() == merged.state_dict().keys()


@pytest.mark.parametrize("kind", ["vit", "convolutions"])
def test_timm_normalises_images_as_the_task_did(kind: str, tmp_path: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.65)
    build, (_, *size) = BUILDS[kind]
    save_pretrained(make_tuned(build), tmp_path, (mean, std))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (tuple(loaded.pretrained_cfg["mean"]), tuple(loaded.pretrained_cfg["std"])) == (mean, std)
    prepare = timm.data.create_transform(**timm.data.resolve_data_config(model=loaded))
    grey = (60, 120, 240)
    image_CHW = prepare(Image.new("RGB", (300, 300), grey))
    wanted_C = torch.tensor([(grey[i] / 255 - mean[i]) / std[i] for i in range(3)])
    torch.testing.assert_close(image_CHW, wanted_C.view(3, 1, 1).expand(3, *size))
    card = re.sub(r"\s+", " ", (tmp_path / "README.md").read_text(encoding="utf-8"))
    assert "has the mean (0.1 0.2 0.3) and the deviation (0.4 0.5 0.65) that the task was trained with" in card
    assert "(size, mean, deviation, crop), which may not be the task's" not in card


def test_a_normalisation_that_is_not_known_is_timms_and_the_card_warns(tmp_path: Path) -> None:
    save_pretrained(make_tuned(BUILDS["convolutions"][0]), tmp_path)
    config = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).pretrained_cfg
    assert (tuple(config["mean"]), tuple(config["std"])) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "(size, mean, deviation, crop), which may not be the task's" in card
    assert "was trained with" not in card


def test_the_weights_are_a_merged_checkpoint(tmp_path: Path) -> None:
    tuned = make_tuned()
    save_pretrained(tuned, tmp_path)
    model = make_vit(seed=2)
    load_merged(model, str(tmp_path / WEIGHTS_FILE))
    assert torch.equal(model(torch.ones(1, 3, 16, 16)), merge(tuned)(torch.ones(1, 3, 16, 16)))


def test_the_card_tells_what_was_trained_and_its_code_runs(tmp_path: Path) -> None:
    tuned = make_tuned()
    save_pretrained(tuned, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    trained = sum(value.numel() for name, value in trainable_parameters(tuned) if not name.startswith("head"))
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card, re.MULTILINE))
    assert rows["method"] == tuned.spt_plan.method
    assert rows["trained parameters, head not counted"].split(" ")[0] == f"{trained:,}"
    assert rows["parameters of the head"] == "250"
    assert rows["fingerprint of the backbone"] == f"`{tuned.spt_fingerprint}`"
    assert f"```\n{tuned.spt_plan.summary()}\n```" in card
    assert f"- timm {timm.__version__}\n" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(tmp_path)), names)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(names["model"](images), merge(tuned)(images))


TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def with_head_by_hand() -> nn.Module:
    model = make_vit()
    model.head = nn.Linear(24, 7)
    return model


def test_what_timm_could_not_build_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(UserError, match="has no tuning modules"):
        save_pretrained(make_vit(), folder)
    with pytest.raises(UserError, match=r"this VisionTransformer was not made by timm\.create_model"):
        save_pretrained(make_tuned(lambda: VisionTransformer(**TINY).eval()), folder)
    with pytest.raises(UserError, match=r"head\.weight has shape \(7, 24\), but timm would build .* with \(10, 24\)"):
        save_pretrained(make_tuned(with_head_by_hand), folder)
    with_function = make_tuned(lambda: make_vit(act_layer=nn.GELU))
    with pytest.raises(UserError, match="'act_layer' is not serializable"):
        save_pretrained(with_function, folder)
    model = make_vit()
    left = inject(model, random_plan(model, 1, ("adapter",)))
    with pytest.raises(UserError, match="modules of kind adapter, which can't be merged"):
        save_pretrained(left, folder)
    assert not folder.exists()


def test_only_earlier_exports_are_replaced(tmp_path: Path) -> None:
    tuned, other = make_tuned(), make_tuned(lambda: make_vit(seed=5))
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match=r"is a file|holds other files than an earlier hf export"):
            save_pretrained(tuned, taken)
    save_peft(tuned, tmp_path / "peft")
    with pytest.raises(UserError, match="holds other files than an earlier hf export"):
        save_pretrained(tuned, tmp_path / "peft")
    for task in (tuned, other):
        save_pretrained(task, tmp_path / "hf")
        loaded = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
        images = torch.randn(2, 3, 16, 16)
        assert torch.equal(loaded(images), merge(task)(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf", "peft"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "README.md", CONFIG_FILE])
def test_an_export_that_was_interrupted_is_no_export(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = make_tuned()
    save_pretrained(tuned, tmp_path)
    with full_disk(monkeypatch, hub, name), pytest.raises(OSError, match="full"):
        save_pretrained(tuned, tmp_path)
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    save_pretrained(tuned, tmp_path)
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> Iterator[None]:
    """Within this, ``module`` can't write the file called ``name``."""

    def limit(write: Callable[..., Path]) -> Callable[..., Path]:
        def limited(path: Path, *content: Any) -> Path:
            if path.name == name:
                raise OSError("full")
            return write(path, *content)

        return limited

    with monkeypatch.context() as patch:
        for function in ("save_tensors", "write_text"):
            patch.setattr(module, function, limit(getattr(module, function)))
        yield
