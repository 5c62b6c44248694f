"""Every step of the public interface on timm models of other kinds than the plain ViT."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import spt_dist
from spt_dist.models.checkpoints import load_backbone
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import pick
from tests.sensitivity.oracle import one_by_one, relative_error

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"img_size": 56, "embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2)}
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "qk norm": ("vit_tiny_patch16_224", VIT | {"qk_norm": True}),
    "layer scale": ("vit_tiny_patch16_224", VIT | {"init_values": 0.1}),
    "mean of tokens": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False, "fc_norm": True}),
    "registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 4}),
    "swiglu": ("vit_giant_patch14_reg4_dinov2", VIT | {"patch_size": 14, "img_size": 28}),
    "two heads": ("deit_tiny_distilled_patch16_224", VIT),
    "windows": ("swin_tiny_patch4_window7_224", SWIN),
    "convolutions": ("convnext_atto", {"conv_mlp": False, "depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
}


def make_model(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A small model with all parameters off their defaults, and three images for it."""
    name, kwargs = ZOO[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    size = kwargs.get("img_size", 64)
    return model, torch.randn(3, 3, size, size)


@pytest.mark.parametrize("kind", ZOO)
def test_the_whole_way(tmp_path: Path, kind: str) -> None:
    model, images = make_model(kind)
    labels = torch.tensor([0, 3, 1])
    scores = spt_dist.estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    wanted = one_by_one(model, images, labels, F.cross_entropy)
    for name in scores.names:
        # Shifting all keys alike changes nothing, so these have no influence at all.
        if not name.endswith(("attn.k.bias", "attn.k_norm.bias")):
            assert relative_error(scores[name], pick(wanted, name)) < 1e-4, name
    before = model(images)
    keys = set(model.state_dict())
    tuned = spt_dist.inject(model, spt_dist.allocate(scores, budget=0.1, rank=1, alpha=10.0, beta=5.0))
    assert torch.equal(tuned(images), before)
    for _, parameter in spt_dist.trainable_parameters(tuned):
        parameter.data += 0.05 * torch.randn_like(parameter)
    outputs = tuned(images)
    merged = spt_dist.merge(tuned)
    assert torch.allclose(merged(images), outputs, rtol=1e-3, atol=1e-4)
    assert set(merged.state_dict()) == keys
    spt_dist.save_delta(tuned, tmp_path / "task.safetensors")
    assert torch.equal(spt_dist.load_delta(make_model(kind)[0], tmp_path / "task.safetensors")(images), outputs)


def test_only_the_head_of_a_file_is_left_out(tmp_path: Path) -> None:
    """ConvNeXt keeps its last norm under ``head``: it belongs to the backbone."""
    model, _ = make_model("convolutions")
    state = {name: value + 1 for name, value in model.state_dict().items()}
    head = model.get_parameter("head.fc.weight").clone()
    save_file(state, tmp_path / "whole.safetensors")
    load_backbone(model, str(tmp_path / "whole.safetensors"))
    assert torch.equal(model.get_parameter("head.norm.weight"), state["head.norm.weight"])
    assert torch.equal(model.get_parameter("head.fc.weight"), head)
    del state["head.norm.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(spt_dist.UserError, match=r"head\.norm\.weight"):
        load_backbone(model, str(tmp_path / "part.safetensors"))


def test_weights_that_are_read_past_their_layer_are_not_tuned() -> None:
    """timm's BEiT applies ``qkv.weight`` itself: a module in the layer's place would never run."""
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", num_classes=5, **VIT)
    with pytest.raises(spt_dist.UserError, match="'q' is no operation of this model"):
        make_plan("lora", model)
    tuned = spt_dist.inject(model, make_plan("lora", model, targets=["proj", "fc1"]))
    F.cross_entropy(tuned(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for _, parameter in spt_dist.trainable_parameters(tuned))


@pytest.mark.parametrize("name", ["resnet18", "mobilevit_xxs"])
def test_batch_norm_is_refused(name: str) -> None:
    model = timm.create_model(name, num_classes=5)
    with pytest.raises(spt_dist.UserError, match="keeps running statistics"):
        spt_dist.estimate_sensitivity(model, [], F.cross_entropy)
