"""Products whose input is computed again in the backward pass instead of being kept.

An MLP's GELU keeps its own input. Its output, which the second layer reads, is kept only for the layer's weight
gradient; so trained parts of that layer can do without it and compute GELU again.

Shape suffixes: I in_features, C chosen ones of them, R rows of a weight; ``...`` any leading axes.
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


def project(x: Tensor, weight_RC: Tensor, source: Activated | None = None, columns_C: Tensor | None = None) -> Tensor:
    """``x[..., columns] @ weight^T``, which keeps no more of ``x`` than its chosen columns for the backward pass.

    Args:
        x: ``(..., I)``.
        weight_RC: ``(R, C)``, any floating dtype.
        source: what ``x`` was computed from; then nothing of ``x`` is kept.
        columns_C: int64 places in the last axis, without repetition; ``None`` for all of it.

    Returns:
        ``(..., R)`` in the dtype of a Linear layer's output for ``x``.
    """
    weight_RC = weight_RC.to(x.dtype)
    if source is None or not torch.is_grad_enabled():
        return F.linear(x if columns_C is None else x.index_select(-1, columns_C), weight_RC)
    return _Project.apply(x, weight_RC, columns_C, source.hidden, source.activation)


class _Project(torch.autograd.Function):
    """The product of ``project``; gradients of ``x`` go through ``x``, so none go to ``hidden`` here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_RC: Tensor, columns_C: Tensor | None, hidden: Tensor, activation: nn.Module
    ) -> Tensor:
        ctx.save_for_backward(weight_RC, columns_C, hidden)
        ctx.activation = activation
        return F.linear(x if columns_C is None else x.index_select(-1, columns_C), weight_RC)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_RC, columns_C, hidden = ctx.saved_tensors
        grad_x = grad_weight = None
        grad = grad.to(weight_RC.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = scatter_columns(grad @ weight_RC, columns_C, hidden.shape[-1])
        if ctx.needs_input_grad[1]:
            chosen = hidden if columns_C is None else hidden.index_select(-1, columns_C)
            x_C = ctx.activation(chosen).flatten(0, -2)
            grad_weight = grad.flatten(0, -2).mT @ x_C.to(grad.dtype)
        return grad_x, grad_weight, None, None, None


def scatter_columns(values_C: Tensor, columns_C: Tensor | None, num_columns: int) -> Tensor:
    """``(..., C)`` values at their columns of ``(..., num_columns)`` zeros; as they are without ``columns_C``."""
    if columns_C is None:
        return values_C
    zeros = values_C.new_zeros(*values_C.shape[:-1], num_columns)
    return zeros.index_copy_(-1, columns_C, values_C)
