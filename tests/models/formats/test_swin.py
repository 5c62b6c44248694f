"""Swin's own files against transformers' model and timm's converter."""

import spt_dist  # noqa: F401  # isort: skip

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification

from tests.models.formats.published import fused, images, load, randomised, renamed

TO_OFFICIAL = {
    r"swin\.embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"swin\.embeddings\.norm": "patch_embed.norm",
    r"swin\.layernorm": "norm",
    r"classifier": "head",
    r"swin\.encoder\.layers\.(\d+)\.downsample": r"layers.\1.downsample",
    r"swin\.encoder\.(layers\.\d+\.blocks\.\d+)\.attention\.relative_position_bias\.": r"\1.attn.",
    r"swin\.encoder\.(layers\.\d+\.blocks\.\d+)\.attention\.o_proj": r"\1.attn.proj",
    r"swin\.encoder\.(layers\.\d+\.blocks\.\d+)\.attention\.": r"\1.attn.",
    r"swin\.encoder\.(layers\.\d+\.blocks\.\d+)\.layernorm_before": r"\1.norm1",
    r"swin\.encoder\.(layers\.\d+\.blocks\.\d+)\.layernorm_after": r"\1.norm2",
    r"swin\.encoder\.": "",
}
OPTIONS = {"img_size": 32, "patch_size": 2, "window_size": 4, "num_classes": 10} | {
    "embed_dim": 12,
    "depths": (2, 2, 1),
    "num_heads": (1, 2, 4),
}


def make_timm(**kwargs: object) -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", **(OPTIONS | kwargs))


def official(theirs: nn.Module) -> dict[str, Tensor]:
    """With the buffers that the published files hold."""
    state = fused(theirs.state_dict(), "attention.{}_proj.", "attention.qkv.")
    state = renamed(state, TO_OFFICIAL)
    blocks = {match[0] for name in state if (match := re.match(r"layers\.\d+\.blocks\.\d+", name))}
    state |= {f"{block}.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64) for block in blocks}
    return state | {f"layers.{layer}.blocks.1.attn_mask": torch.zeros(4, 16, 16) for layer in (0, 1)}


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    config = SwinConfig(
        image_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=12,
        depths=[2, 2, 1],
        num_heads=[1, 2, 4],
        num_labels=10,
    )
    return randomised(SwinForImageClassification(config))


def test_swin(tmp_path: Path, theirs: nn.Module) -> None:
    state = official(theirs)
    torch.save({"model": state}, tmp_path / "swin_base_patch4_window7_224_22k.pth")
    model, translation = load(make_timm(), tmp_path / "swin_base_patch4_window7_224_22k.pth")
    torch.testing.assert_close(model(images()), theirs(images()).logits, rtol=1e-9, atol=1e-9)
    assert translation.format == "Swin"
    assert translation.sources["layers.2.downsample.norm.bias"].names == ("layers.1.downsample.norm.bias",)
    assert translation.sources["head.fc.bias"].names == ("head.bias",)
    assert set(translation.unused.values()) == {"computed from the sizes of window and image"}
    assert len(translation.unused) == 5 + 2
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == translation.sources.keys()


def test_neither_head_nor_buffers(tmp_path: Path, theirs: nn.Module) -> None:
    """What merges patches alone tells whose it is."""
    computed = ("relative_position_index", "attn_mask")
    state = {name: value for name, value in official(theirs).items() if not name.endswith(computed)}
    torch.save({name: value for name, value in state.items() if not name.startswith("head.")}, tmp_path / "swin.pth")
    model, translation = load(make_timm(num_classes=0), tmp_path / "swin.pth")
    assert (translation.format, translation.unused) == ("Swin", {})
    features = theirs.swin(images()).pooler_output
    torch.testing.assert_close(model(images()), features, rtol=1e-9, atol=1e-9)


def test_what_timm_writes_now_stays(tmp_path: Path) -> None:
    wanted = make_timm().state_dict()
    torch.save(wanted, tmp_path / "swin.pth")
    model, translation = load(make_timm(), tmp_path / "swin.pth")
    assert translation.format == "timm"
    assert all(torch.equal(value.float(), wanted[name]) for name, value in model.state_dict().items())


def test_buffers_beside_todays_names_are_left(tmp_path: Path) -> None:
    """timm's files of some releases: the stages as they are now, and what is computed."""
    wanted = make_timm().state_dict()
    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}
    torch.save(wanted | index, tmp_path / "swin.pth")
    model, translation = load(make_timm(), tmp_path / "swin.pth")
    assert translation.unused.keys() == index.keys()
    assert all(torch.equal(value.float(), wanted[name]) for name, value in model.state_dict().items())


def test_swin_v2(tmp_path: Path) -> None:
    """Its files merge patches at a stage's end too, and hold more that is computed."""
    options = OPTIONS | {"window_size": 4}
    wanted = timm.create_model("swinv2_tiny_window8_256", **options).state_dict()
    state = {}
    for name, value in wanted.items():
        earlier = re.sub(r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
        state[earlier.replace("head.fc.", "head.")] = value
    state["layers.0.blocks.0.attn.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
    torch.save({"model": state}, tmp_path / "swinv2.pth")
    model, translation = load(timm.create_model("swinv2_tiny_window8_256", **options), tmp_path / "swinv2.pth")
    assert translation.unused.keys() == {"layers.0.blocks.0.attn.relative_coords_table"}
    assert all(torch.equal(value.float(), wanted[name]) for name, value in model.state_dict().items())
