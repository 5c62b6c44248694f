"""CLIP's and SigLIP's towers against transformers' own models: the same images, the same features."""

import spt_dist  # noqa: F401  # isort: skip

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from spt_dist.models.formats import Shape, translate
from spt_dist.models.weight_files import open_weights
from tests.models.formats.published import fused, images, load, randomised, renamed

TOWER = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "intermediate_size": 96} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TO_OPENAI = {
    r"vision_model\.embeddings\.class_embedding": "visual.class_embedding",
    r"vision_model\.embeddings\.patch_embedding": "visual.conv1",
    r"vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"vision_model\.pre_layrnorm": "visual.ln_pre",
    r"vision_model\.post_layernorm": "visual.ln_post",
    r"vision_model\.encoder\.layers\.(\d+)\.layer_norm": r"visual.transformer.resblocks.\1.ln_",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.in_proj": r"visual.transformer.resblocks.\1.attn.in_proj",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj": r"visual.transformer.resblocks.\1.attn.out_proj",
    r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1": r"visual.transformer.resblocks.\1.mlp.c_fc",
    r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc2": r"visual.transformer.resblocks.\1.mlp.c_proj",
    r"visual_projection\.weight": "visual.proj",
}
OF_TEXT = (
    "positional_embedding",
    "text_projection",
    "logit_scale",
    "token_embedding.weight",
    "ln_final.bias",
    "transformer.resblocks.0.attn.in_proj_weight",
    "logit_bias",
    "attn_mask",
    "text_projection.weight",
    "text.transformer.embeddings.weight",
)
UNKNOWN = ("audio.conv1.weight", "transformers.weight", "textual.ln_final.bias", "positional_embedding_2", "gamma")


def make_tower() -> nn.Module:
    config = CLIPVisionConfig(**TOWER, projection_dim=10, hidden_act="quick_gelu")
    return randomised(CLIPVisionModelWithProjection(config))


def make_timm(num_classes: int = 10, **kwargs: object) -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=num_classes, **(options | kwargs))


def to_openai(tower: nn.Module) -> dict[str, Tensor]:
    """As OpenAI names the tensors, which open_clip does too, beside some of the text's tower."""
    state = fused(tower.state_dict(), "self_attn.{}_proj.", "self_attn.in_proj_")
    found = renamed(state, TO_OPENAI)
    found["visual.proj"] = found["visual.proj"].t().contiguous()
    return found | {name: torch.ones(2, 3) for name in OF_TEXT}


@pytest.mark.parametrize("module", ["", "module."])
def test_open_clip(tmp_path: Path, module: str) -> None:
    tower = make_tower()
    state = {module + name: value for name, value in to_openai(tower).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "clip.pt")
    model, translation = load(make_timm(), tmp_path / "clip.pt")
    torch.testing.assert_close(model(images()), tower(images()).image_embeds, rtol=1e-9, atol=1e-9)
    assert translation.format == "open_clip"
    assert {why for why in translation.unused.values()} == {"text tower of CLIP"}
    assert sorted(translation.unused) == sorted(module + name for name in OF_TEXT)
    # timm reads it so, too.
    theirs = checkpoint_filter_fn(state, make_timm())
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    assert theirs.keys() >= translation.sources.keys()


def test_what_is_of_neither_tower_stays(tmp_path: Path) -> None:
    unknown = {name: torch.ones(2) for name in UNKNOWN}
    torch.save(to_openai(make_tower()) | unknown, tmp_path / "clip.pt")
    _, translation = load(make_timm(), tmp_path / "clip.pt", ignored=UNKNOWN)
    assert sorted(translation.unused) == sorted(OF_TEXT)
    assert all(translation.sources[name].names == (name,) for name in UNKNOWN)
    trunk = {f"visual.trunk.{name}": value for name, value in make_timm().state_dict().items()}
    torch.save(trunk | dict.fromkeys(OF_TEXT, torch.ones(2)) | unknown, tmp_path / "clip.pt")
    _, translation = load(make_timm(), tmp_path / "clip.pt", ignored=UNKNOWN)
    assert sorted(translation.unused) == sorted(OF_TEXT)
    assert all(translation.sources[name].names == (name,) for name in UNKNOWN)


def test_a_projection_that_is_no_head_is_left(tmp_path: Path) -> None:
    tower = make_tower()
    torch.save(to_openai(tower), tmp_path / "clip.pt")
    model, translation = load(make_timm(num_classes=3), tmp_path / "clip.pt", ignored=("head",))
    assert translation.unused["visual.proj"] == "projection to the space that text shares"
    assert not any(name.startswith("head") for name in translation.sources)
    found = model.forward_head(model.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(found, tower.vision_model(images()).pooler_output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_text", [False, True])
def test_hugging_face(tmp_path: Path, with_text: bool) -> None:
    tower = make_tower()
    state = dict(tower.state_dict())
    # Files of transformers before 4.31 have these.
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    if with_text:
        both = CLIPModel(CLIPConfig(text_config={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 8}))
        state = {name: value for name, value in both.state_dict().items() if not name.startswith("vi")} | state
    save_file(state, tmp_path / "model.safetensors")
    model, translation = load(make_timm(), tmp_path / "model.safetensors")
    torch.testing.assert_close(model(images()), tower(images()).image_embeds, rtol=1e-9, atol=1e-9)
    reasons = {"counts the positions"} | ({"text tower of CLIP"} if with_text else set())
    assert set(translation.unused.values()) == reasons
    assert translation.sources["blocks.1.attn.qkv.bias"].names == tuple(
        f"vision_model.encoder.layers.1.self_attn.{letter}_proj.bias" for letter in "qkv"
    )


def test_a_tower_alone(tmp_path: Path) -> None:
    """As ``CLIPVisionModel`` writes it."""
    tower = make_tower()
    save_file(tower.vision_model.state_dict(), tmp_path / "model.safetensors")
    model, _ = load(make_timm(), tmp_path / "model.safetensors", ignored=("head",))
    found = model.forward_head(model.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(found, tower.vision_model(images()).pooler_output, rtol=1e-9, atol=1e-9)


def test_siglip(tmp_path: Path) -> None:
    tower = randomised(SiglipVisionModel(SiglipVisionConfig(**TOWER)))
    save_file({f"vision_model.{name}": value for name, value in tower.state_dict().items()}, tmp_path / "a.safetensors")
    model, translation = load(make_siglip(), tmp_path / "a.safetensors")
    torch.testing.assert_close(model(images()), tower(images()).pooler_output, rtol=1e-9, atol=1e-9)
    assert translation.unused == {}


def make_siglip() -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_base_patch16_siglip_224", act_layer="gelu_tanh", **options)


def test_siglip_2_for_any_aspect_ratio(tmp_path: Path) -> None:
    """Its patch embedding is linear in a patch's pixels, which its processor unrolls."""
    options = {name: value for name, value in TOWER.items() if name != "image_size"}
    tower = randomised(Siglip2VisionModel(Siglip2VisionConfig(**options, num_patches=16)))
    # It resamples them in float32, here to the grid that they have.
    positions = tower.get_parameter("embeddings.position_embedding.weight")
    positions.data = positions.data.float().double()
    state = {f"vision_model.{name}": value for name, value in tower.state_dict().items()}
    name = "vision_model.embeddings.patch_embedding.weight"
    assert state[name].shape == (24, 8 * 8 * 3)
    save_file(state, tmp_path / "a.safetensors")
    model, translation = load(make_siglip(), tmp_path / "a.safetensors")
    source = translation.sources["patch_embed.proj.weight"]
    assert (source.names, source.shape, source.how) == ((name,), (24, 3, 8, 8), "channels first")
    assert translation.sources["patch_embed.proj.bias"].make is None
    patches = torch.stack([convert_image_to_patches(image, 8) for image in images()])
    mask, sizes = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4], [4, 4]])
    wanted = tower(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=sizes).pooler_output
    torch.testing.assert_close(model(images()), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wanted", [None, (24, 192), (24, 3, 4, 4)])
def test_a_linear_patch_embedding_stays_where_no_kernel_of_its_size_is_wanted(
    tmp_path: Path, wanted: Shape | None
) -> None:
    name = "patch_embed.proj.weight"
    state = {"embeddings.patch_embedding.weight": torch.ones(24, 192)}
    save_file(state | {"encoder.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    translation = translate(open_weights(tmp_path / "a.safetensors"), {name: wanted} if wanted else {})
    assert (translation.sources[name].shape, translation.sources[name].make) == ((24, 192), None)


def test_query_key_and_value_that_do_not_belong_together_stay(tmp_path: Path) -> None:
    state = dict(make_tower().vision_model.state_dict())
    stem = "encoder.layers.{}.self_attn.{}_proj.{}"
    del state[stem.format(0, "k", "bias")]
    state[stem.format(1, "v", "weight")] = torch.ones(24, 12)
    save_file(state, tmp_path / "model.safetensors")
    translation = translate(open_weights(tmp_path / "model.safetensors"), {})
    alone = [stem.format(0, letter, "bias") for letter in "qv"] + [stem.format(1, letter, "weight") for letter in "qkv"]
    assert all(translation.sources[name].names == (name,) for name in alone)
    made = [name for name in translation.sources if "qkv" in name]
    assert made == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.bias"]


@pytest.mark.parametrize("num_classes", [10, 3])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_towers_of_timm(tmp_path: Path, name: str, num_classes: int) -> None:
    options = {"vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}}.get(
        name, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    )
    tower = randomised(timm.create_model(name, num_classes=0, **options))
    projection = torch.randn(10, tower.num_features, dtype=torch.float64)
    state = {f"visual.trunk.{own_name}": value for own_name, value in tower.state_dict().items()}
    of_text = {"text.transformer.embeddings.weight": torch.ones(2), "logit_scale": torch.ones([])}
    torch.save(state | {"visual.head.proj.weight": projection} | of_text, tmp_path / "clip.bin")
    model = timm.create_model(name, num_classes=num_classes, **options)
    ignored = () if num_classes == 10 else ("head.weight", "head.bias", "head.fc.")
    model, translation = load(model, tmp_path / "clip.bin", ignored)
    if num_classes == 10:
        torch.testing.assert_close(model(images()), tower(images()) @ projection.t(), rtol=1e-9, atol=1e-9)
        assert translation.unused.keys() == of_text.keys()
    else:
        found = model.forward_head(model.forward_features(images()), pre_logits=True)
        torch.testing.assert_close(found, tower(images()), rtol=1e-9, atol=1e-9)
        assert translation.unused.keys() == {*of_text, "visual.head.proj.weight"}
