"""Per-sample gradients of depthwise kernels against autograd in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spt_dist.sensitivity.depthwise import depthwise_gradients
from spt_dist.sensitivity.rules import score_conv2d
from tests.sensitivity.oracle import relative_error
from tests.sensitivity.test_rules import check


@pytest.mark.parametrize("width", [5, 32, 33, 70])
@pytest.mark.parametrize(("kernel", "dilation"), [((7, 7), (1, 1)), ((3, 5), (2, 3)), ((1, 1), (1, 1))])
def test_every_row_has_its_own_gradient(width: int, kernel: tuple[int, int], dilation: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rim = [(size - 1) * step for size, step in zip(kernel, dilation, strict=True)]
    grads = torch.randn(3, 2, 6, width, dtype=torch.float64)
    inputs = torch.randn(3, 2, 6 + rim[0], width + rim[1], dtype=torch.float64)
    found = depthwise_gradients(inputs, grads, kernel, dilation)
    for x, d, gradient in zip(inputs, grads, found, strict=True):
        weight = torch.zeros(2, 1, *kernel, dtype=torch.float64, requires_grad=True)
        loss = (F.conv2d(x[None], weight, dilation=dilation, groups=2) * d).sum()
        (wanted,) = torch.autograd.grad(loss, weight)
        assert torch.allclose(gradient, wanted[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 3, "kernel_size": 7},
        {"padding": "same", "kernel_size": (2, 5), "dilation": 2},
        {"padding": 1, "kernel_size": 3, "padding_mode": "reflect", "bias": False},
        {"padding": 1, "kernel_size": 3, "stride": 2},
    ],
)
@pytest.mark.parametrize("num_samples", [1, 2, 6])
def test_squares_of_samples(options: dict[str, object], num_samples: int) -> None:
    """One row a sample, several (windows), and all as one; also of images in another memory format."""
    torch.manual_seed(0)
    check(nn.Conv2d(3, 3, groups=3, **options), torch.randn(6, 3, 9, 40), num_samples)
    last = torch.randn(6, 3, 9, 40).to(memory_format=torch.channels_last)
    check(nn.Conv2d(3, 3, groups=3, **options), last, num_samples)


def test_batches_are_squared_with_the_rounding_of_autograd() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), torch.randn(5, 4, 9, 9)
    d = torch.randn(5, 4, 9, 9)
    (wanted,) = torch.autograd.grad((conv(x) * d).sum(), conv.weight)
    scores = {"weight": torch.zeros_like(conv.weight)}
    with torch.no_grad():
        score_conv2d(conv, x, d, 1, scores)
    assert torch.equal(scores["weight"], wanted.square())
    with torch.no_grad():
        score_conv2d(conv, x, d, 5, scores)
    assert relative_error(scores["weight"], wanted.square().double()) > 0.01
