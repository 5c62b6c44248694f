"""Recognising files, and what no file may do."""

from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from spt_dist import UserError
from spt_dist.models.formats import Shape, translate
from spt_dist.models.mmseg_names import to_mmseg
from tests.models.formats.published import Listed, load, shapes_of
from tests.models_for_tests import make_vit


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("naming", ["timm", "mmseg"])
def test_wrappers(tmp_path: Path, wrapper: str, naming: str) -> None:
    wanted = make_vit().state_dict()
    state = to_mmseg(wanted) if naming == "mmseg" else wanted
    torch.save({wrapper + name: value for name, value in state.items()}, tmp_path / "vit.pth")
    model, translation = load(make_vit(1), tmp_path / "vit.pth")
    assert all(torch.equal(value.float(), wanted[name]) for name, value in model.state_dict().items())
    assert (translation.format, translation.unused) == (naming, {})
    own_name = {"timm": "norm.weight", "mmseg": "ln1.weight"}[naming]
    assert translation.sources["norm.weight"].names == (wrapper + own_name,)


def test_blocks_that_were_compiled_or_checkpointed_one_by_one() -> None:
    names = ["blocks.0._orig_mod.norm1.weight", "blocks.1._checkpoint_wrapped_module.norm1.weight", "pos_embed"]
    translation = translate(Listed(dict.fromkeys(names, (4,))), {})
    assert list(translation.sources) == ["blocks.0.norm1.weight", "blocks.1.norm1.weight", "pos_embed"]
    assert [source.names for source in translation.sources.values()] == [(name,) for name in names]


def test_a_prefix_of_some_names_is_part_of_them() -> None:
    names = ["module.norm.weight", "norm.weight"]
    assert list(translate(Listed(dict.fromkeys(names, (4,))), {}).sources) == names


def test_segmentors_keep_their_prefix() -> None:
    shapes = {f"backbone.{name}": shape for name, shape in shapes_of(make_vit(num_classes=0)).items()}
    shapes |= {"decode_head.conv_seg.weight": (3, 5)}
    found = translate(Listed(to_mmseg(shapes)), {})
    assert {name: source.shape for name, source in found.sources.items()} == shapes
    assert found.format == "mmseg"


def test_a_name_that_mmseg_does_not_have() -> None:
    shapes = to_mmseg(shapes_of(make_vit())) | {"layers.0.gamma": (3,)}
    with pytest.raises(UserError, match=r"layers\.0\.gamma: no weight of a plain ViT under mmseg's names"):
        translate(Listed(shapes), {})


@pytest.mark.parametrize("distilled", [False, True])
def test_deit(tmp_path: Path, distilled: bool) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
    name = f"deit_tiny_{'distilled_' if distilled else ''}patch16_224"
    wanted = timm.create_model(name, **options).state_dict()
    torch.save({"model": wanted}, tmp_path / "deit.pth")
    model, translation = load(timm.create_model(name, **options), tmp_path / "deit.pth")
    assert all(torch.equal(value.float(), wanted[name]) for name, value in model.state_dict().items())
    assert translation.unused == {}
    assert ("head_dist.weight" in translation.sources) == distilled


def test_layer_scales_of_deit_3(tmp_path: Path) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("deit3_small_patch16_224", **options)
    wanted = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value for name, value in wanted.items()
    }
    assert state.keys() != wanted.keys()
    torch.save({"model": state}, tmp_path / "deit3.pth")
    load(model, tmp_path / "deit3.pth", has_class_position=False)
    assert all(torch.equal(value.float(), wanted[name]) for name, value in model.state_dict().items())


def test_layer_scales_of_beit_stay(tmp_path: Path) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("beit_base_patch16_224", **options)
    assert "blocks.0.gamma_1" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "beit.pth")
    load(timm.create_model("beit_base_patch16_224", **options), tmp_path / "beit.pth")


def test_a_representation_layer_takes_the_head_with_it() -> None:
    shapes = shapes_of(make_vit()) | {"pre_logits.fc.weight": (24, 24), "pre_logits.fc.bias": (24,)}
    translation = translate(Listed(shapes), shapes_of(make_vit()))
    assert translation.unused == {
        "pre_logits.fc.weight": "representation layer, which timm's models have not",
        "pre_logits.fc.bias": "representation layer, which timm's models have not",
        "head.weight": "reads the representation layer, which is left out",
        "head.bias": "reads the representation layer, which is left out",
    }
    # A model that has the layer gets it.
    assert translate(Listed(shapes), shapes).unused == {}


@pytest.mark.parametrize(
    ("names", "target"),
    [
        (["cls_token", "_orig_mod.cls_token"], None),
        (["mask_token", "pos_embed", "blocks.0.ls1.gamma", "register_tokens", "reg_token"], "reg_token"),
        (["base_encoder.blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.weight"], "blocks.0.attn.qkv.weight"),
        (["blocks.0.gamma_1", "blocks.0.ls1.gamma"], "blocks.0.ls1.gamma"),
        (
            ["embedding/kernel", *(f"Transformer/encoderblock_0/LayerNorm_{number}/scale" for number in (1, 2))],
            "blocks.0.norm2.weight",
        ),
    ],
)
def test_two_tensors_for_one(names: list[str], target: str | None) -> None:
    listed = Listed(dict.fromkeys(names, (1, 4, 4)))
    if target is None:
        # Which of them is the model's is told by its own name.
        assert list(translate(listed, {}).sources) == names
        return
    with pytest.raises(UserError) as caught:
        translate(listed, {})
    assert str(caught.value).endswith(f"are both {target} under timm's names; keep one of them in the file")
    assert sum(name in str(caught.value).split() for name in names) >= 2


# Names that formats are recognised by, and others that they know.
KNOWN = [
    *("cls_token", "pos_embed", "mask_token", "reg_token", "register_tokens", "dist_token", "head.weight", "head.bias"),
    *("norm.weight", "fc_norm.bias", "pre_logits.fc.weight", "patch_embed.proj.weight", "decoder_pos_embed"),
    *("blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma", "blocks.0.gamma_1", "blocks.0.mlp.w12.weight"),
    *("base_encoder.blocks.0.attn.qkv.weight", "base_encoder.head.0.weight", "predictor.0.weight"),
    *("backbone.layers.0.attn.attn.in_proj_weight", "layers.0.attn.attn.in_proj_weight", "layers.0.ln1.weight"),
    *("layers.0.blocks.0.attn.qkv.weight", "layers.0.downsample.reduction.weight", "layers.1.downsample.norm.weight"),
    *("layers.0.blocks.1.attn_mask", "downsample_layers.0.0.weight", "downsample_layers.1.0.bias"),
    *("stages.0.0.dwconv.weight", "stages.0.0.grn.gamma", "stages.0.0.grn.beta", "stages.1.0.pwconv1.weight"),
    *("visual.transformer.resblocks.0.ln_1.weight", "visual.proj", "visual.class_embedding", "visual.conv1.weight"),
    *("visual.positional_embedding", "visual.trunk.pos_embed", "visual.trunk.cls_token", "visual.head.proj.weight"),
    *("vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.class_embedding", "logit_scale"),
    *(f"vision_model.encoder.layers.0.self_attn.{letter}_proj.weight" for letter in "qkv"),
    *("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight", "visual_projection.weight"),
    *(
        "vit.embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.weight",
        "pooler.dense.bias",
    ),
    *(f"vit.encoder.layer.0.attention.attention.{part}.weight" for part in ("query", "key", "value")),
    *(
        "vit.layernorm.weight",
        "classifier.weight",
        "classifier.bias",
        "distillation_classifier.bias",
        "decoder.norm.bias",
    ),
    *("layers.0.attention.q_proj.weight", "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"),
    *("encoder.layer.0.mlp.weights_in.weight", "embeddings.mask_token", "embeddings.position_embeddings"),
    *("encoder.layers.0.blocks.0.layernorm_before.weight", "encoder.layers.0.downsample.norm.weight"),
    *("encoder.layers.0.blocks.0.attention.self.query.bias", "encoder.layers.0.blocks.0.attention.self.logit_scale"),
    *("embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.grn.weight", "convnext.layernorm.bias"),
    *("vision_model.head.attention.in_proj_weight", "vision_model.embeddings.position_embedding.weight"),
    *("embedding/kernel", "cls", "pos_embedding", "pre_logits/kernel", "head/kernel", "params/img/embedding/kernel"),
    *(f"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/{part}/kernel" for part in ("query", "key", "value")),
    *(f"Transformer/encoderblock_0/MultiHeadDotProductAttention_0/{part}/bias" for part in ("query", "key", "value")),
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel",
    *("Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel", "Transformer/encoderblock_0/LayerNorm_2/scale"),
]
PREFIXES = ["", "", "", "module.", "_orig_mod.", "backbone."]
names = st.one_of(st.sampled_from(KNOWN), st.text(max_size=6))
# Mostly the same shape, so that tensors go together.
shapes = st.one_of(st.just((2, 3, 6)), st.just((6, 6)), st.lists(st.integers(0, 6), max_size=5).map(tuple))


@given(
    prefix=st.sampled_from(PREFIXES),
    held=st.dictionaries(names, shapes, max_size=12),
    wanted=st.dictionaries(st.sampled_from(KNOWN), shapes, max_size=6),
    has_class_position=st.booleans(),
)
def test_any_file_is_accounted_for_or_refused(
    prefix: str, held: dict[str, Shape], wanted: dict[str, Shape], has_class_position: bool
) -> None:
    held = {prefix + name: shape for name, shape in held.items()}
    try:
        translation = translate(Listed(held), wanted, has_class_position=has_class_position)
    except UserError:
        return
    used = {name for source in translation.sources.values() for name in source.names}
    assert used | translation.unused.keys() == held.keys()
    for source in translation.sources.values():
        values = [torch.zeros(held[name]) for name in source.names]
        made = source.make(*values) if source.make else values[0]
        assert tuple(made.shape) == source.shape
