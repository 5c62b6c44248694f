"""The rule of each kind of layer against autograd on one sample at a time in float64."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import GroupNorm, GroupNorm1, LayerNorm, LayerNorm2d
from torch import Tensor, nn

from spt_dist.models.layers import layer_kind
from spt_dist.sensitivity.rules import find_rule
from tests.sensitivity.oracle import relative_error

TOLERANCE = 1e-5


def by_autograd(layer: nn.Module, inputs: Tensor, grads: Tensor, num_samples: int) -> dict[str, Tensor]:
    """Sum over samples of the squared gradient of ``(layer(x) * d).sum()``, float64."""
    layer = copy.deepcopy(layer).double()
    totals = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    for x, d in zip(inputs.double().chunk(num_samples), grads.double().chunk(num_samples), strict=True):
        gradients = torch.autograd.grad((layer(x) * d).sum(), list(layer.parameters()))
        for name, gradient in zip(totals, gradients, strict=True):
            totals[name] += gradient.square()
    return totals


def check(layer: nn.Module, inputs: Tensor, num_samples: int) -> None:
    """The rule adds what the oracle has."""
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    grads = torch.randn_like(layer(inputs))
    scores = {name: torch.ones_like(parameter) for name, parameter in layer.named_parameters()}
    rule = find_rule(layer)
    assert rule is not None
    with torch.no_grad():
        rule(layer, inputs, grads, num_samples, scores)
    for name, wanted in by_autograd(layer, inputs, grads, num_samples).items():
        # What was there before stays: rules add.
        assert relative_error(scores[name], 1 + wanted) < TOLERANCE, name


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
)
def test_linear_with_any_leading_axes(
    axes: list[int], num_samples: int, in_features: int, out_features: int, bias: bool
) -> None:
    check(nn.Linear(in_features, out_features, bias), torch.randn(num_samples, *axes, in_features), num_samples)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_convolutions(data: st.DataObject) -> None:
    """Grouped, depthwise, strided, dilated, with every kind of padding."""
    groups = data.draw(st.integers(1, 3))
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding: Any = data.draw(st.sampled_from(["valid", "same", 0, 1, (0, 2)]))
    stride = 1 if padding == "same" else data.draw(st.sampled_from([1, 2, kernel]))
    conv = nn.Conv2d(
        groups * data.draw(st.integers(1, 2)),
        groups * data.draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=data.draw(st.integers(1, 2)),
        groups=groups,
        bias=data.draw(st.booleans()),
        padding_mode=data.draw(st.sampled_from(["zeros", "reflect", "circular"])),
    )
    num_samples = data.draw(st.integers(1, 3))
    size = data.draw(st.tuples(st.integers(5, 8), st.integers(5, 8)))
    check(conv, torch.randn(num_samples, conv.in_channels, *size), num_samples)


@pytest.mark.parametrize("size", [(8, 12), (10, 13)])
def test_patch_embedding(size: tuple[int, int]) -> None:
    """Patches that tile the image, and an image whose rim no patch covers."""
    check(nn.Conv2d(3, 7, 4, stride=4), torch.randn(3, 3, *size), 3)


def test_several_rows_a_sample() -> None:
    """Windows of one sample follow one another along the outermost axis."""
    check(nn.Linear(4, 3), torch.randn(6, 5, 4), 2)
    check(nn.LayerNorm(4), torch.randn(6, 5, 4), 2)
    check(nn.Conv2d(2, 3, 3, padding=1), torch.randn(6, 2, 4, 4), 2)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(6), (3, 5, 6)),
        (nn.LayerNorm((5, 6)), (3, 2, 5, 6)),
        (nn.LayerNorm(6, bias=False), (3, 6)),
        (LayerNorm(6), (3, 2, 5, 6)),
        (LayerNorm2d(6), (3, 6, 2, 5)),
        (nn.GroupNorm(2, 6), (3, 6, 4)),
        (GroupNorm(6, 3), (3, 6, 2, 2)),
        (GroupNorm1(6), (3, 6, 2, 5)),
    ],
)
def test_norms(norm: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(norm, 3 + torch.randn(shape), 3)


class Doubled(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        """``(B, in_features)`` to ``(B, out_features)``."""
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A Linear under another name."""


def test_kinds_go_by_what_is_computed() -> None:
    assert layer_kind(Renamed(2, 2)) == "linear"
    assert layer_kind(Doubled(2, 2)) is None
    assert layer_kind(nn.Bilinear(2, 2, 2)) is None
