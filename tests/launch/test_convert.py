"""Files of weights shown and written anew, from the command line."""

from collections.abc import Mapping
from pathlib import Path

# Must come before timm and mmseg: it makes them importable beside CPU builds.
import spt_dist  # noqa: F401  # isort: skip

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from spt_dist.models.mmseg_names import to_mmseg
from tests.launch.processes import Launch, ScriptResult, run_all
from tests.models_for_tests import make_vit

pytestmark = pytest.mark.slow

LIST = "model.safetensors.index.json"


def make_state() -> dict[str, Tensor]:
    """A ViT without a head."""
    return dict(make_vit(num_classes=0).state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT under timm's names, a segmentor under mmseg's, and a file of something else."""
    folder = tmp_path_factory.mktemp("convert")
    save_file(make_state(), folder / "vit.safetensors")
    segmentor = {f"backbone.{name}": value for name, value in to_mmseg(make_state()).items()}
    torch.save({"state_dict": segmentor | {"decode_head.weight": torch.ones(2)}, "meta": {}}, folder / "setr.pth")
    save_file({"conv.weight": torch.ones(2)}, folder / "other.safetensors")
    decoder = {"decoder_pos_embed": torch.ones(1, 5, 8), "mask_token": torch.ones(1, 1, 8)}
    torch.save({"model": dict(make_vit().state_dict()) | decoder}, folder / "mae.pth")
    (folder / "parts").mkdir()
    save_torch_state_dict(make_state(), folder / "parts", max_shard_size=20_000)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Mapping[str, ScriptResult]:
    """One launch for each direction, and one file that can't be converted."""
    launches = {
        "to mmseg": ["vit.safetensors", "mmseg/vit.pth"],
        "to timm": ["setr.pth", "setr.safetensors", "--to", "timm"],
        "format alone": ["setr.pth", "same.safetensors", "--to", "mmseg"],
        "other": ["other.safetensors", "other.pth"],
    }
    model = ["--model", "vit_tiny_patch16_224", "--kwargs", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=2"]
    kept = ["--num-classes", "10", "--keep-head"]
    shown = {
        "shown": [folder / "mae.pth"],
        "fitted": [folder / "mae.pth", folder / "fitted.safetensors", *model, "img_size=32", *kept],
        "in parts": [folder / "parts" / LIST, folder / "joined.safetensors", *model, "img_size=16"],
        "another model": [folder / "mae.pth", *model, "img_size=32", "init_values=0.1"],
        "two ways": [folder / "vit.safetensors", "--to", "mmseg"],
        "--kwargs": [folder / "mae.pth", "--kwargs", "img_size=32"],
        "--num-classes": [folder / "vit.safetensors", folder / "refused.safetensors", "--num-classes", "10"],
        "--keep-head": [folder / "mae.pth", "--keep-head"],
    }
    return run_all(
        {
            name: Launch(["convert.py", folder / source, folder / target, *options])
            for name, (source, target, *options) in launches.items()
        }
        | {name: Launch(["convert.py", *arguments]) for name, arguments in shown.items()}
    )


def test_a_list_of_files_becomes_one_file(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    assert len(list((folder / "parts").glob("*.safetensors"))) > 2
    assert f"tensors  {len(make_state())}" in results["in parts"].check().stdout
    found = load_file(folder / "joined.safetensors")
    assert found.keys() == make_state().keys()
    assert all(torch.equal(found[name], value) for name, value in make_state().items())


@pytest.mark.segmentation
def test_mmengine_loads_it_into_mmsegs_own_model(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    backbones = pytest.importorskip("mmseg.models.backbones")
    from mmengine.runner import load_checkpoint

    assert results["to mmseg"].check().stdout.splitlines()[1:] == ["names    mmseg (were timm)", "tensors  30"]
    model = backbones.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dims=24,
        num_layers=2,
        num_heads=2,
        patch_bias=True,
        final_norm=True,
        norm_cfg={"type": "LN", "eps": 1e-6},
    )
    load_checkpoint(model, str(folder / "mmseg" / "vit.pth"), map_location="cpu", strict=True)
    images = torch.randn(2, 3, 16, 16)
    wanted = make_vit(num_classes=0).forward_features(images)[:, 1:].transpose(1, 2).reshape(2, 24, 2, 2)
    # mmseg's own returns nothing here.
    model.eval()
    assert torch.allclose(model(images)[0], wanted, atol=1e-5)


def test_a_segmentor_under_timms_names(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    assert results["to timm"].check().stdout.splitlines()[1:] == ["names    timm (were mmseg)", "tensors  31"]
    found = load_file(folder / "setr.safetensors")
    wanted = {f"backbone.{name}": value for name, value in make_state().items()} | {"decode_head.weight": torch.ones(2)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_the_format_alone(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    results["format alone"].check()
    found, wanted = load_file(folder / "same.safetensors"), torch.load(folder / "setr.pth")["state_dict"]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_other_models_are_refused(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    assert results["other"].rc == 2
    (line,) = results["other"].error_lines
    assert "other.safetensors: no plain ViT under timm's or mmseg's names; first: ['conv.weight']" in line
    assert not (folder / "other.pth").exists()


def test_what_is_in_a_file_is_shown(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    lines = results["shown"].check().stdout.splitlines()
    assert lines[:2] == [
        f"{folder / 'mae.pth'}: 34 tensors, format MAE, 2 left out",
        "under timm's names 32 tensors: 32 taken as they are",
    ]
    cells = [[cell.strip() for cell in line.split("│")] for line in lines]
    assert ["", "blocks.*.attn.qkv.weight", "2", "same", "72 x 24", "", ""] in cells
    assert ["", "decoder_pos_embed", "1", "", "1 x 5 x 8", "decoder of MAE", ""] in cells


def test_weights_are_written_as_a_model_takes_them(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    lines = results["fitted"].check().stdout.splitlines()
    assert any("1 x 5 x 24 -> 1 x 17 x 24" in line and "resampled from 2 x 2 to 4 x 4" in line for line in lines)
    assert lines[-1] == "tensors  32"
    found, model = load_file(folder / "fitted.safetensors"), make_vit(img_size=32)
    wanted = checkpoint_filter_fn(dict(make_vit().state_dict()), model)
    assert found.keys() == wanted.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_what_does_not_fit_is_told(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    (line,) = results["another model"].error_lines
    assert "mae.pth: read as MAE's, it does not fit this backbone: 4 of 34 keys are missing" in line
    assert "(first: ['blocks.0.ls1.gamma'])" in line
    (line,) = results["two ways"].error_lines
    assert "--to mmseg: is for writing OUT under the names of a plain ViT" in line
    assert results["another model"].rc == results["two ways"].rc == 2


@pytest.mark.parametrize("option", ["--kwargs", "--num-classes", "--keep-head"])
def test_options_of_a_model_need_one(option: str, folder: Path, results: Mapping[str, ScriptResult]) -> None:
    assert results[option].rc == 2
    assert results[option].error_lines == [
        f"error: {option}: says how a model takes IN; give its name with --model, or leave {option} out"
    ]
    assert not (folder / "refused.safetensors").exists()
