"""Names of mmseg's ViT and of timm's, against the modules that the two libraries build."""

# Must come before timm and mmseg: it makes them importable beside CPU builds.
import spt_dist  # noqa: F401  # isort: skip

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.models import VisionTransformer

from spt_dist import UserError
from spt_dist.models.mmseg_names import MMSEG, TIMM, check_whole, naming_of, to_mmseg, to_timm

OTHERS = ("decode_head.conv_seg.weight", "auxiliary_head.0.norm.weight", "neck.blocks.0.norm1.bias", "norm.weight")


def timm_shapes(depth: int, final_norm: bool, num_classes: int = 0) -> dict[str, Any]:
    """Name -> shape of timm's ViT."""
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=depth, num_heads=2, num_classes=num_classes, final_norm=final_norm
    )
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@given(
    depth=st.integers(1, 12),
    final_norm=st.booleans(),
    num_classes=st.sampled_from([0, 3]),
    is_segmentor=st.booleans(),
)
def test_there_and_back(depth: int, final_norm: bool, num_classes: int, is_segmentor: bool) -> None:
    state = timm_shapes(depth, final_norm, num_classes)
    if is_segmentor:
        state = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("head")}
        state |= dict.fromkeys(OTHERS, (1,))
    converted = to_mmseg(state)
    assert to_timm(converted) == state
    assert list(to_timm(converted)) == list(state)
    assert (naming_of(state), naming_of(converted)) == (TIMM, MMSEG)
    assert len(converted) == len(state)
    assert not any("blocks." in name for name in converted if name not in OTHERS)
    if is_segmentor:
        assert all(converted[name] == (1,) for name in OTHERS)


@pytest.mark.segmentation
@pytest.mark.parametrize("final_norm", [False, True])
def test_the_names_are_those_of_mmseg(final_norm: bool) -> None:
    backbones = pytest.importorskip("mmseg.models.backbones")
    model = backbones.VisionTransformer(
        img_size=16, patch_size=8, embed_dims=8, num_layers=3, num_heads=2, patch_bias=True, final_norm=final_norm
    )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert to_mmseg(timm_shapes(3, final_norm)) == shapes
    assert to_timm(shapes) == timm_shapes(3, final_norm)


@pytest.mark.segmentation
def test_the_converter_of_mmseg_agrees() -> None:
    mmseg = pytest.importorskip("mmseg")
    script = Path(mmseg.__file__).parent / ".mim" / "tools" / "model_converters" / "vit2mmseg.py"
    namespace: dict[str, Any] = {"__name__": "vit2mmseg"}
    exec(compile(script.read_text(), script, "exec"), namespace)
    state = timm_shapes(11, final_norm=True)
    assert dict(namespace["convert_vit"](state)) == to_mmseg(state)


@pytest.mark.parametrize("name", ["blocks.0.ls1.gamma", "reg_token", "blocks.x.norm1.weight", "norms.weight"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_what_has_no_counterpart_is_named(name: str, prefix: str) -> None:
    state = {f"{prefix}{own}": () for own in [*timm_shapes(1, True), name]}
    with pytest.raises(UserError, match=f"^{re.escape(prefix + name)}: no weight of a plain ViT under timm's names"):
        to_mmseg(state)
    converted = to_mmseg({own: value for own, value in state.items() if own != prefix + name}) | {prefix + name: ()}
    with pytest.raises(UserError, match="under mmseg's names"):
        to_timm(converted)


def test_other_models_have_neither_naming() -> None:
    assert naming_of(["layers.0.blocks.0.attn.qkv.weight", "patch_embed.proj.weight"]) is None


@pytest.mark.parametrize("lost", ["cls_token", "blocks.1.norm2.bias", "blocks.0.mlp.fc1.weight"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_part_of_a_vit_is_no_vit(prefix: str, lost: str) -> None:
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2, num_classes=0)
    names = {prefix + name for name in model.state_dict()} | {"decode_head.conv_seg.weight"}
    check_whole(names)
    with pytest.raises(UserError, match=f"{lost} and 0 more weights of a plain ViT are missing"):
        check_whole(names - {prefix + lost})
    with pytest.raises(UserError, match=r"mlp\.fc2\.weight and 2 more"):
        check_whole({name for name in names if "mlp.fc2.weight" not in name})
