"""DINOv3's backbones against transformers' own models: the same images, the same tokens."""

import spt_dist  # noqa: F401  # isort: skip

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from spt_dist import UserError
from spt_dist.models.checkpoints import WeightsFile, load_backbone
from tests.models.formats.published import fused, images, load, randomised, renamed

SIZES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2} | {
    "num_attention_heads": 2,
    "num_register_tokens": 4,
    "intermediate_size": 96,
}
OF_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
# As facebookresearch/dinov3 names them.
TO_OFFICIAL = {
    r"embeddings\.patch_embeddings": "patch_embed.proj",
    r"embeddings\.register_tokens": "storage_tokens",
    r"embeddings\.": "",
    r"norm\.": "norm.",
    r"model\.layer\.(\d+)\.attention\.o_proj": r"blocks.\1.attn.proj",
    r"model\.layer\.(\d+)\.attention\.qkv": r"blocks.\1.attn.qkv",
    r"model\.layer\.(\d+)\.layer_scale(\d)\.lambda1": r"blocks.\1.ls\2.gamma",
}
TO_OFFICIAL_GATED = {
    r"model\.layer\.(\d+)\.mlp\.gate_proj": r"blocks.\1.mlp.w1",
    r"model\.layer\.(\d+)\.mlp\.up_proj": r"blocks.\1.mlp.w2",
    r"model\.layer\.(\d+)\.mlp\.down_proj": r"blocks.\1.mlp.w3",
    r"model\.layer\.(\d+)\.": r"blocks.\1.",
}
TO_OFFICIAL_PLAIN = {
    r"model\.layer\.(\d+)\.mlp\.up_proj": r"blocks.\1.mlp.fc1",
    r"model\.layer\.(\d+)\.mlp\.down_proj": r"blocks.\1.mlp.fc2",
    r"model\.layer\.(\d+)\.": r"blocks.\1.",
}


def make_theirs(plus: bool, biases: bool) -> nn.Module:
    options = {"use_gated_mlp": plus, "hidden_act": "silu" if plus else "gelu"}
    config = DINOv3ViTConfig(**SIZES, **options, query_bias=biases, value_bias=biases)
    return randomised(DINOv3ViTModel(config))


def to_official(model: nn.Module, plus: bool) -> dict[str, Tensor]:
    """The key's bias is there, any numbers, and masked out."""
    state = dict(model.state_dict())
    for block in range(2):
        before = f"model.layer.{block}.attention."
        none = torch.zeros(24, dtype=torch.float64)
        query, value = (state.pop(f"{before}{part}_proj.bias", none) for part in "qv")
        state[f"{before}qkv.bias"] = torch.cat([query, torch.full((24,), 7.0), value])
        state[f"{before}qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(24)
    state = fused(state, "attention.{}_proj.weight", "attention.qkv.weight")
    state = renamed(state, TO_OFFICIAL | (TO_OFFICIAL_GATED if plus else TO_OFFICIAL_PLAIN))
    return state | {"rope_embed.periods": torch.ones(3), "local_cls_norm.weight": torch.ones(24)}


@pytest.mark.parametrize(
    ("name", "plus", "biases"),
    [
        ("vit_small_patch16_dinov3", False, False),
        ("vit_small_patch16_dinov3_qkvb", False, True),
        ("vit_small_patch16_dinov3_qkvb", False, False),
        ("vit_small_plus_patch16_dinov3", True, False),
        ("vit_small_plus_patch16_dinov3_qkvb", True, True),
    ],
)
def test_dinov3(tmp_path: Path, name: str, plus: bool, biases: bool) -> None:
    theirs = make_theirs(plus, biases)
    state = to_official(theirs, plus)
    torch.save(state, tmp_path / "dinov3_pretrain.pth")
    model, translation = load(timm.create_model(name, **OF_TIMM), tmp_path / "dinov3_pretrain.pth")
    # Both compute the rotations in float32.
    torch.testing.assert_close(model.forward_features(images()), theirs(images()).last_hidden_state, rtol=0, atol=1e-6)
    assert translation.format == "DINOv3"
    assert translation.unused == {
        "mask_token": "stands for masked patches in pre-training",
        "rope_embed.periods": "rotations that stand for positions, which the model computes",
        "local_cls_norm.weight": "norm of the class tokens of small crops in pre-training",
        "blocks.0.attn.qkv.bias_mask": "takes away the key's bias, which timm's models have not",
        "blocks.1.attn.qkv.bias_mask": "takes away the key's bias, which timm's models have not",
    }
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == translation.sources.keys()
    assert all(torch.equal(value, converted[own_name]) for own_name, value in model.state_dict().items())


def test_biases_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    """timm's own reader drops them."""
    theirs = make_theirs(plus=False, biases=True)
    path, hub_path = tmp_path / "dinov3_pretrain.pth", tmp_path / "pytorch_model.bin"
    torch.save(to_official(theirs, plus=False), path)
    torch.save(theirs.state_dict(), hub_path)
    model = timm.create_model("vit_small_patch16_dinov3", **OF_TIMM)
    names = {path: "blocks.0.attn.qkv.bias", hub_path: "model.layer.0.attention.q_proj.bias"}
    for file, name in names.items():
        with pytest.raises(UserError) as caught:
            load_backbone(model, str(file))
        assert f"{file}: {name} is not zero" in str(caught.value) and "_qkvb" in str(caught.value)
        torch.save({key: without_bias(key, value) for key, value in torch.load(file).items()}, file)
        load_backbone(model, str(file))
        rows = {row.target: row for row in WeightsFile(str(file)).check(model).rows}
        assert "biases have to be zero" in rows["blocks.0.attn.qkv.weight"].how


def without_bias(name: str, value: Tensor) -> Tensor:
    """Zero, but for the key's, if it is a bias of a projection."""
    if name.endswith("qkv.bias"):
        return value * torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(24)
    return torch.zeros_like(value) if name.endswith(("q_proj.bias", "v_proj.bias")) else value


def test_a_key_with_a_bias_is_refused(tmp_path: Path) -> None:
    """Of another's training: nothing masks it."""
    state = to_official(make_theirs(plus=False, biases=False), plus=False)
    del state["blocks.1.attn.qkv.bias_mask"]
    torch.save(state, tmp_path / "a.pth")
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", **OF_TIMM)
    with pytest.raises(UserError, match=r"unexpected \(first: \['blocks\.1\.attn\.qkv\.bias'\]\)"):
        load_backbone(model, str(tmp_path / "a.pth"))
