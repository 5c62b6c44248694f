"""DINOv2's backbones against transformers' own models: the same images, the same tokens."""

import spt_dist  # noqa: F401  # isort: skip

from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from tests.models.formats.published import fused, images, load, randomised, renamed

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
# As facebookresearch/dinov2 names them.
TO_OFFICIAL = {
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.": "",
    r"layernorm": "norm",
    r"encoder\.layer\.(\d+)\.attention\.o_proj": r"blocks.\1.attn.proj",
    r"encoder\.layer\.(\d+)\.attention\.qkv": r"blocks.\1.attn.qkv",
    r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1": r"blocks.\1.ls\2.gamma",
    r"encoder\.layer\.(\d+)\.mlp\.down_proj": r"blocks.\1.mlp.w3",
    r"encoder\.layer\.(\d+)": r"blocks.\1",
}


def to_official(model: nn.Module) -> dict[str, Tensor]:
    state = fused(model.state_dict(), "attention.{}_proj.", "attention.qkv.")
    for name in list(state):
        if "gate_proj" in name:
            parts = [state.pop(each) for each in (name, name.replace("gate_proj", "up_proj"))]
            state[name.replace("gate_proj", "w12")] = torch.cat(parts)
    return renamed(state, TO_OFFICIAL)


@pytest.mark.parametrize("giant", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(tmp_path: Path, registers: int, giant: bool) -> None:
    if registers:
        config = Dinov2WithRegistersConfig(**SIZES, use_swiglu_ffn=giant, num_register_tokens=registers)
        theirs = randomised(Dinov2WithRegistersModel(config))
    else:
        theirs = randomised(Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=giant)))
    state = to_official(theirs)
    torch.save(state, tmp_path / "dinov2_pretrain.pth")
    name = f"vit_{'giant' if giant else 'small'}_patch14_{'reg4_' if registers else ''}dinov2"
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    # The hidden width of SwiGLU is two thirds of 4 x 24, as a multiple of 8, twice: its gate and its values.
    options |= {"mlp_ratio": 128 / 24} if giant else {}
    model, translation = load(
        timm.create_model(name, **options), tmp_path / "dinov2_pretrain.pth", has_class_position=not registers
    )
    wanted = theirs(images()).last_hidden_state
    torch.testing.assert_close(model.forward_features(images()), wanted, rtol=1e-9, atol=1e-9)
    assert translation.format == "DINOv2"
    assert translation.unused == {"mask_token": "stands for masked patches in pre-training"}
    if registers:
        assert translation.sources["cls_token"].names == ("cls_token", "pos_embed")
        assert translation.sources["cls_token"].how == "class position added to the token"
    converted = checkpoint_filter_fn(dict(state), model)
    assert converted.keys() == translation.sources.keys()
    assert all(torch.equal(value, converted[own_name]) for own_name, value in model.state_dict().items())
