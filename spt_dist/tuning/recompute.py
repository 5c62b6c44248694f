"""Products whose input is computed again in the backward pass instead of being kept.

An MLP's GELU keeps its own input. Its output, which the second layer reads, is kept only for the layer's weight
gradient; so trained parts of that layer can do without it and compute GELU again.

Shapes: I in_features, R rows of a weight; ``...`` any leading axes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Activated:
    """Says of a tensor that it is ``activation(hidden)``, element by element, and that ``hidden`` is kept anyway."""

    hidden: Tensor
    activation: nn.Module


def project(x: Tensor, weight: Tensor, source: Activated | None = None) -> Tensor:
    """``x @ weight^T``, which keeps nothing of ``x`` for the backward pass if its ``source`` is known.

    Args:
        x: ``(..., I)``.
        weight: ``(R, I)``, any floating dtype.
        source: what ``x`` was computed from.

    Returns:
        ``(..., R)`` in the dtype of a Linear layer's output for ``x``.
    """
    weight = weight.to(x.dtype)
    if source is None or not torch.is_grad_enabled():
        return F.linear(x, weight)
    return _Project.apply(x, weight, source.hidden, source.activation)


class _Project(torch.autograd.Function):
    """The product of ``project``; gradients of ``x`` go through ``x``, so none go to ``hidden`` here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, hidden: Tensor, activation: nn.Module) -> Tensor:
        ctx.save_for_backward(weight, hidden)
        ctx.activation = activation
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, hidden = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            x = ctx.activation(hidden).to(grad.dtype)
            grad_weight = grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        return grad_x, grad_weight, None, None
