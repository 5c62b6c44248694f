"""Sums of squared per-sample gradients on a CPU, against their definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spt_dist.sensitivity.kernels import add_squared_gradients
from tests.sensitivity.oracle import relative_error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def definition(scores_OI: Tensor, inputs_BTI: Tensor, grads_BTO: Tensor) -> Tensor:
    """The scores afterwards, float64, one sample at a time."""
    total_OI = scores_OI.double()
    for inputs_TI, grads_TO in zip(inputs_BTI.double(), grads_BTO.double(), strict=True):
        total_OI += torch.einsum("ti,to->oi", inputs_TI, grads_TO).square()
    return total_OI


@settings(deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_scores_equal_the_definition(sizes: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> None:
    B, T, I, O = sizes  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    inputs_BTI = torch.randn(B, T, I, generator=generator).to(dtype)
    grads_BTO = torch.randn(B, T, O, generator=generator).to(dtype)
    scores_OI = torch.rand(O, I, generator=generator)
    wanted = definition(scores_OI, inputs_BTI, grads_BTO)
    add_squared_gradients(scores_OI, inputs_BTI, grads_BTO)
    assert scores_OI.dtype == torch.float32
    assert relative_error(scores_OI, wanted) < 1e-5


@pytest.mark.parametrize("tokens", [1, 6])
def test_views_are_scored_as_what_they_show(tokens: int) -> None:
    """A part of the flat score buffer, inputs with tokens side by side and one gradient for all tokens."""
    buffer = torch.rand(3 + 12 * 8 + 5)
    inputs_BTI = torch.randn(4, 8, tokens).mT
    grads_BTO = torch.randn(4, 1, 12).expand(-1, tokens, -1)
    before = buffer.clone()
    wanted = definition(buffer[3:-5].view(12, 8), inputs_BTI, grads_BTO)
    add_squared_gradients(buffer[3:-5].view(12, 8), inputs_BTI, grads_BTO)
    assert relative_error(buffer[3:-5].view(12, 8), wanted) < 1e-5
    assert torch.equal(buffer[:3], before[:3])
    assert torch.equal(buffer[-5:], before[-5:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_count_as_autocast_rounded_them(dtype: torch.dtype) -> None:
    """The layer multiplied with the rounded inputs, so autograd's own weight gradient has them too."""
    layer = torch.nn.Linear(16, 8, bias=False)
    inputs_BTI = torch.randn(1, 5, 16)
    with torch.autocast("cpu", dtype):
        outputs_BTO = layer(inputs_BTI)
    grads_BTO = torch.randn(1, 5, 8).to(dtype)
    outputs_BTO.backward(grads_BTO)
    scores_OI = torch.zeros(8, 16)
    add_squared_gradients(scores_OI, inputs_BTI, grads_BTO)
    assert relative_error(scores_OI, definition(torch.zeros(8, 16), inputs_BTI.to(dtype), grads_BTO)) < 1e-5
    assert layer.weight.grad is not None
    assert relative_error(scores_OI.sqrt(), layer.weight.grad.double().abs()) < 2 * torch.finfo(dtype).eps
