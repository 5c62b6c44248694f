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
from spt_dist.models.classifier import create_model
from spt_dist.models.matrices import take_inventory
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import pick
from tests.sensitivity.oracle import one_by_one, relative_error

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"img_size": 56, "embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2)}
PATCH_14: dict[str, Any] = VIT | {"patch_size": 14, "img_size": 28}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "qk norm": ("vit_tiny_patch16_224", VIT | {"qk_norm": True}),
    "layer scale": ("vit_tiny_patch16_224", VIT | {"init_values": 0.1}),
    "mean of tokens": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False, "fc_norm": True}),
    "mean but the class token": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg"}),
    "pooled by attention": ("vit_base_patch16_siglip_224", VIT),
    "registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 4}),
    "all at once": ("vit_tiny_patch16_224", VIT | {"qk_norm": True, "init_values": 0.1, "reg_tokens": 4}),
    "swiglu": ("vit_giant_patch14_reg4_dinov2", PATCH_14),
    "swiglu without registers": ("vit_giant_patch14_dinov2", PATCH_14),
    "clip": ("vit_base_patch16_clip_224", VIT),
    "clip, giant": ("vit_giant_patch14_clip_224", PATCH_14),
    "two heads": ("deit_tiny_distilled_patch16_224", VIT),
    "split projections": ("eva02_base_patch14_224", PATCH_14),
    "biases beside the projections": ("beitv2_base_patch16_224", VIT),
    "the same, rotated": ("eva_giant_patch14_224", PATCH_14),
    "rotated positions": ("vit_small_patch16_dinov3", VIT),
    "all that a dinov3 can have": ("vit_small_plus_patch16_dinov3_qkvb", VIT),
    "windows": ("swin_tiny_patch4_window7_224", SWIN),
    "shifted windows": ("swin_large_patch4_window7_224", SWIN | {"depths": (2, 2)}),
    "tables from networks": ("swinv2_tiny_window8_256", SWIN | {"img_size": 64, "depths": (2, 2)}),
    "convolutions": ("convnext_base", CONVNEXT),
    "pointwise convolutions": ("convnext_atto", CONVNEXT | {"conv_mlp": True}),
    "response norm": ("convnextv2_atto", CONVNEXT | {"conv_mlp": False}),
    "response norm of channels": ("convnextv2_atto", CONVNEXT | {"conv_mlp": True}),
}
# What has no scores, and why.
LEFT_OUT: dict[str, dict[str, str]] = {
    "pooled by attention": {"attn_pool.latent": "passes through attn_pool.q before it meets the samples"},
}
# These read something else than the samples, once for all of them, which only one sample at a time can be scored with.
ALONE = ("tables from networks",)
# timm's query is expanded, and torch multiplies such tensors by another kernel; or biases are added later.
APART = ("biases beside the projections", "the same, rotated", "all that a dinov3 can have", "tables from networks")
ROUNDED = ("pooled by attention", *APART)


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
    size = 1 if kind in ALONE else None
    scores = spt_dist.estimate_sensitivity(model, [(images, labels)], F.cross_entropy, micro_batch=size)
    wanted = one_by_one(model, images, labels, F.cross_entropy)
    assert scores.info.skipped == LEFT_OUT.get(kind, {})
    check_account(model, scores)
    for name in scores.names:
        # Shifting all keys alike changes nothing, so these have no influence at all.
        if not name.endswith(("attn.k.bias", "attn.k_norm.bias")):
            assert relative_error(scores[name], pick(wanted, name)) < 1e-4, name
    before = model(images)
    keys = set(model.state_dict())
    plan = spt_dist.allocate(scores, budget=0.6, rank=1, alpha=10.0, beta=5.0)
    assert plan.matrices
    tuned = spt_dist.inject(model, plan)
    assert torch.allclose(tuned(images), before, rtol=1e-5, atol=1e-6 if kind in ROUNDED else 0)
    assert kind in ROUNDED or torch.equal(tuned(images), before)
    for _, parameter in spt_dist.trainable_parameters(tuned):
        parameter.data += 0.05 * torch.randn_like(parameter)
    outputs = tuned(images)
    merged = spt_dist.merge(tuned)
    assert torch.allclose(merged(images), outputs, rtol=1e-3, atol=1e-4)
    assert set(merged.state_dict()) == keys
    spt_dist.save_delta(tuned, tmp_path / "task.safetensors")
    assert torch.equal(spt_dist.load_delta(make_model(kind)[0], tmp_path / "task.safetensors")(images), outputs)


def check_account(model: nn.Module, scores: spt_dist.Scores) -> None:
    """Each weight of the model is scored, left out or the head's, and the inventory's table says so."""
    inventory = take_inventory(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    head = sum(sizes[name] for name in scores.info.head)
    scored = sum(scores[name].numel() for name in scores.names)
    left_out = sum(sizes[name] for name in scores.info.skipped)
    assert scored + left_out == scores.info.backbone_size == sum(sizes.values()) - head
    table = inventory.summary(scores.info.skipped)
    assert f"{scores.info.backbone_size:,} weights outside the head, {left_out:,} of them left out" in table
    lines = [line for line in table.splitlines() if line.startswith("│")]
    cells = [[cell.strip().replace(",", "") for cell in line.split("│")[1:-1]] for line in lines]
    rows = [(name, int(tensors), int(weights)) for name, tensors, weights in cells]
    kinds = [row for row, line in zip(rows, lines, strict=True) if not line.startswith("│   ")]
    operations = [row for row in rows if row not in kinds]
    for found in (kinds, operations):
        assert sum(weights for _, _, weights in found) == sum(sizes.values())
        assert sum(tensors for _, tensors, _ in found) == sum(
            map(len, (scores.names, scores.info.skipped, scores.info.head))
        )
    matrices = sum(weights for name, _, weights in kinds if name.startswith("matrices"))
    assert matrices == sum(scores[name].numel() for name in scores.info.matrices)
    for reason in scores.info.skipped.values():
        assert f"left out: {reason}" in table


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


@pytest.mark.parametrize("kind", APART)
def test_projections_are_called_where_it_matters(kind: str) -> None:
    """timm applies their weights itself otherwise: a module in the layer's place would never run."""
    model, images = make_model(kind)
    attentions = [module for module in model.modules() if hasattr(module, "qkv_bias_separate")]
    called: list[nn.Module] = []
    for attention in attentions:
        attention.get_submodule("qkv").register_forward_hook(lambda layer, *_: called.append(layer))
    before = model(images)
    batch = (images[:1], torch.tensor([0]))
    assert not called
    spt_dist.estimate_sensitivity(model, [batch], F.cross_entropy)
    assert len(called) == len(attentions) > 1 and not any(each.qkv_bias_separate for each in attentions)
    assert torch.equal(model(images), before)
    name, kwargs = ZOO[kind]
    built = create_model(name, 5, kwargs, torch.device("cpu"))
    assert [each.qkv_bias_separate for each in built.modules() if hasattr(each, "qkv_bias_separate")] == [True] * len(
        attentions
    )
    tuned = spt_dist.inject(model, make_plan("lora", model, targets=["q", "v"]))
    F.cross_entropy(tuned(batch[0]), batch[1]).backward()
    assert all(parameter.grad is not None for _, parameter in spt_dist.trainable_parameters(tuned))


class Attention(nn.Module):
    """Reads the weight of its layer without a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12, bias=False), nn.Linear(12, 4)
        self.q_bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(F.linear(x, self.qkv.weight, self.q_bias))
        return x


def test_weights_that_are_read_past_their_layer_are_not_tuned() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Attention())
    batch = torch.randn(2, 4), torch.tensor([0, 1])
    why = {"1.qkv.weight": "its weight is used without calling the layer"}
    assert take_inventory(model).skipped == why
    assert spt_dist.estimate_sensitivity(model, [batch], F.cross_entropy).info.skipped == why
    with pytest.raises(spt_dist.UserError, match="'q' is no operation of this model"):
        make_plan("lora", model)
    tuned = spt_dist.inject(model, make_plan("lora", model, targets=["proj"]))
    F.cross_entropy(tuned(batch[0]), batch[1]).backward()
    assert all(parameter.grad is not None for _, parameter in spt_dist.trainable_parameters(tuned))


@pytest.mark.parametrize("name", ["resnet18", "mobilevit_xxs"])
def test_batch_norm_is_refused(name: str) -> None:
    model = timm.create_model(name, num_classes=5)
    with pytest.raises(spt_dist.UserError, match="keeps running statistics"):
        spt_dist.estimate_sensitivity(model, [], F.cross_entropy)
