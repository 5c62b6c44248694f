"""MAE's and MoCo v3's files of pre-training, and what fine-tuning writes."""

import spt_dist  # noqa: F401  # isort: skip

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from tests.models.formats.published import fused, images, load, randomised, renamed
from tests.models_for_tests import make_vit

MAE_TO_OFFICIAL = {
    r"vit\.embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"vit\.embeddings\.position_embeddings": "pos_embed",
    r"vit\.embeddings\.": "",
    r"vit\.layernorm": "norm",
    r"vit\.layers\.(\d+)\.attention\.o_proj": r"blocks.\1.attn.proj",
    r"vit\.layers\.(\d+)\.attention\.": r"blocks.\1.attn.",
    r"vit\.layers\.(\d+)\.layernorm_before": r"blocks.\1.norm1",
    r"vit\.layers\.(\d+)\.layernorm_after": r"blocks.\1.norm2",
    r"vit\.layers\.(\d+)\.mlp": r"blocks.\1.mlp",
    r"decoder\.decoder_layers\.(\d+)\.attention\.o_proj": r"decoder_blocks.\1.attn.proj",
    r"decoder\.decoder_layers\.(\d+)\.attention\.": r"decoder_blocks.\1.attn.",
    r"decoder\.decoder_layers\.(\d+)\.layernorm_before": r"decoder_blocks.\1.norm1",
    r"decoder\.decoder_layers\.(\d+)\.layernorm_after": r"decoder_blocks.\1.norm2",
    r"decoder\.decoder_layers\.(\d+)\.mlp": r"decoder_blocks.\1.mlp",
    r"decoder\.": "",
}


def test_mae(tmp_path: Path) -> None:
    config = ViTMAEConfig(
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
        layer_norm_eps=1e-6,
        mask_ratio=0.0,
    )
    theirs = randomised(ViTMAEForPreTraining(config))
    state = renamed(fused(theirs.state_dict(), "attention.{}_proj.", "attention.qkv."), MAE_TO_OFFICIAL)
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(blr=1e-3)}, tmp_path / "mae.pth")
    model, translation = load(make_vit(img_size=32), tmp_path / "mae.pth", ignored=("head",))
    # They shuffle the patches, which the class token doesn't see.
    wanted = theirs.vit(images()).last_hidden_state[:, 0]
    torch.testing.assert_close(model.forward_features(images())[:, 0], wanted, rtol=1e-9, atol=1e-9)
    assert translation.format == "MAE"
    of_decoder = {name for name in state if name.startswith("decoder_")}
    assert len(of_decoder) == 31
    assert translation.unused == dict.fromkeys(of_decoder, "decoder of MAE") | {
        "mask_token": "stands for masked patches in pre-training"
    }


def test_the_encoder_of_mae_alone_and_fine_tuned_mae_have_timms_names(tmp_path: Path) -> None:
    for pooling in ("token", "avg"):
        state = make_vit(global_pool=pooling).state_dict()
        assert ("fc_norm.weight" in state) == (pooling == "avg")
        torch.save({"model": state}, tmp_path / "mae_pretrain.pth")
        model, translation = load(make_vit(1, global_pool=pooling), tmp_path / "mae_pretrain.pth")
        assert (translation.format, translation.unused) == ("timm", {})
        assert all(torch.equal(value.float(), state[name]) for name, value in model.state_dict().items())


@pytest.fixture
def moco_state() -> dict[str, Tensor]:
    """As the training script saves DistributedDataParallel's model; heads are MLPs with batch norm."""
    base, momentum = make_vit(1).state_dict(), make_vit(2).state_dict()
    state = {}
    for encoder, values in (("base_encoder", base), ("momentum_encoder", momentum)):
        state |= {f"{encoder}.{name}": values[name] for name in values if not name.startswith("head")}
        state |= {f"{encoder}.head.{name}": torch.ones(3) for name in ("0.weight", "1.running_mean", "6.weight")}
        state[f"{encoder}.head.1.num_batches_tracked"] = torch.tensor(3)
    state |= {"predictor.0.weight": torch.ones(3, 3), "predictor.4.running_var": torch.ones(3)}
    return {f"module.{name}": value for name, value in state.items()}


def test_moco_v3(tmp_path: Path, moco_state: dict[str, Tensor]) -> None:
    path = tmp_path / "vit-b-300ep.pth.tar"
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": moco_state, "scaler": {"scale": 2.0}}, path)
    model, translation = load(make_vit(), path, ignored=("head",))
    wanted = make_vit(1).state_dict()
    differing = [name for name, value in model.state_dict().items() if not torch.equal(value.float(), wanted[name])]
    assert differing == ["head.weight", "head.bias"]
    assert translation.format == "MoCo v3"
    assert translation.unused["module.base_encoder.head.0.weight"] == "projection of MoCo v3"
    assert translation.unused["module.momentum_encoder.cls_token"] == "momentum encoder of MoCo v3"
    assert translation.unused["module.predictor.0.weight"] == "predictor of MoCo v3"
    assert len(translation.unused) == 4 + (4 + 30) + 2


def test_linear_probing_of_moco_v3_has_timms_names(tmp_path: Path) -> None:
    wanted = make_vit(1).state_dict()
    path = tmp_path / "linear-vit-b-300ep.pth.tar"
    torch.save({"state_dict": {f"module.{name}": value for name, value in wanted.items()}}, path)
    model, translation = load(make_vit(), path)
    assert all(torch.equal(value.float(), wanted[name]) for name, value in model.state_dict().items())
    assert (translation.format, translation.unused) == ("timm", {})
