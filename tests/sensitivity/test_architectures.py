"""Scores of all parameters of several architectures, the directly used ones included, against one sample at a time."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import UserError, estimate_sensitivity
from tests.models_for_tests import pick
from tests.sensitivity.oracle import one_by_one, relative_error

VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WINDOWS: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
THIN: dict[str, Any] = {"dims": (8, 16, 16, 16), "depths": (2, 1, 1, 1)}
# Name, options, image size, and parameters that are used directly.
MODELS: dict[str, tuple[str, dict[str, Any], int, list[str]]] = {
    "class token": ("vit_tiny_patch16_224", VIT, 16, ["cls_token", "pos_embed"]),
    "pooled": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False}, 16, ["pos_embed"]),
    "dense": ("vit_tiny_patch16_224", VIT | {"global_pool": ""}, 16, ["cls_token", "pos_embed"]),
    "registers, layer scale": (
        "vit_small_patch14_reg4_dinov2",
        VIT | {"img_size": 28, "patch_size": 14},
        28,
        ["reg_token", "cls_token", "pos_embed", "blocks.1.ls2.gamma"],
    ),
    "resampled positions": (
        "vit_tiny_patch16_224",
        VIT | {"img_size": 32, "dynamic_img_size": True},
        24,
        ["cls_token", "pos_embed"],
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT, 16, ["dist_token"]),
    "windows": (
        "swin_tiny_patch4_window7_224",
        WINDOWS,
        32,
        ["layers.0.blocks.0.attn.relative_position_bias_table", "layers.0.blocks.1.attn.relative_position_bias_table"],
    ),
    "convolutions": ("convnext_atto", THIN, 32, ["stages.0.blocks.1.gamma"]),
    "pointwise convolutions": ("convnext_atto", THIN | {"conv_mlp": True}, 32, ["stages.0.blocks.1.gamma"]),
    "functional biases": (
        "beit_base_patch16_224",
        VIT | {"use_abs_pos_emb": True},
        16,
        ["blocks.0.attn.q_bias", "blocks.1.attn.v_bias", "blocks.0.gamma_1", "pos_embed"],
    ),
    "tables": (
        "beit_base_patch16_224",
        VIT | {"use_rel_pos_bias": True},
        16,
        ["blocks.1.attn.relative_position_bias_table"],
    ),
}


def make_model(kind: str) -> tuple[nn.Module, Tensor]:
    """A small model with all parameters off their defaults, and five images."""
    name, kwargs, size, _ = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randn(5, 3, size, size)


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, of every token where there are several."""
    if outputs.ndim == 2:
        return F.cross_entropy(outputs, targets)
    return F.cross_entropy(outputs.transpose(1, 2), targets.unsqueeze(1).expand(-1, outputs.shape[1]))


@pytest.mark.parametrize("fused_attention", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_scored_exactly(kind: str, fused_attention: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 2 if fused_attention else 0)
    model, images = make_model(kind)
    labels = torch.randint(5, (5,))
    wanted = one_by_one(model, images, labels, loss_of)
    scores = estimate_sensitivity(model, [(images[:2], labels[:2]), (images[2:], labels[2:])], loss_of)
    direct = MODELS[kind][3]
    assert set(direct) <= set(scores.names)
    assert all(name.endswith("qkv.weight") for name in scores.info.skipped)
    top = max(float(value.max()) for value in wanted.values())
    for name in scores.names:
        expected = wanted[name] if name in wanted else pick(wanted, name)
        if name.endswith("attn.k.bias"):
            assert float(scores[name].max()) < 1e-9 * top
        else:
            assert relative_error(scores[name], expected) < 5e-5, name
    for name in direct:
        assert float(wanted[name].max()) > 0, name


class Mixed(nn.Module):
    """Parameters used in ways that can be followed, and in ways that can't."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.twice = nn.Parameter(torch.randn(4))
        self.powers = nn.Parameter(torch.rand(3, 1) + 0.5)
        self.mixing = nn.Parameter(torch.randn(4, 4))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 4)`` to ``(B, 4)``."""
        x = self.first(x) * self.twice
        x = x - self.twice / 2 + self.powers.exp().sum()
        return x @ self.mixing


def test_what_cannot_be_followed_is_named() -> None:
    torch.manual_seed(0)
    model, x, y = Mixed(), torch.randn(6, 4), torch.randint(4, (6,))
    scores = estimate_sensitivity(model, [(x, y)], F.cross_entropy)
    wanted = one_by_one(model, x, y, F.cross_entropy)
    assert scores.info.skipped == {
        "mixing": "no rule for its use in matmul",
        "unused": "not used in a way that can be followed to the samples",
    }
    assert scores.names == ("twice", "powers", "first.weight", "first.bias")
    for name in scores.names:
        assert relative_error(scores[name], wanted[name]) < 1e-5, name


class TokensFirst(nn.Module):
    """A table that meets the samples along the second axis, ``(T, B, D)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(6, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 4)`` to ``(B, 4)``."""
        return (self.first(x) * self.table).mean(dim=0)


def test_parameters_that_meet_samples_along_another_axis_are_refused() -> None:
    model, x, y = TokensFirst(), torch.randn(3, 4), torch.randint(4, (3,))
    with pytest.raises(UserError, match=r"table: meets 6 rows for 2 samples and 6 for one"):
        estimate_sensitivity(model, [(x, y)], F.cross_entropy)
    scores = estimate_sensitivity(model, [(x, y)], F.cross_entropy, micro_batch=1)
    wanted = one_by_one(model, x, y, F.cross_entropy)
    assert relative_error(scores["table"], wanted["table"]) < 1e-5
