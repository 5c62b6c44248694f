"""Single weights of a matrix, tuned without a dense gradient.

The chosen weights lie in few rows R and columns C. With V the small |R| x |C| matrix that holds the trainable values
at their places and zero elsewhere, ``y[..., R] += x[..., C] V^T`` is the exact update: only the columns C of ``x`` are
kept for the backward pass, and the frozen weight is neither copied nor touched. Where the weights are strewn so that V
would be nearly empty, each is multiplied by itself instead.

Shape suffixes: I in_features, O out_features, C chosen columns, K chosen weights; ``...`` any leading axes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spt_dist.tuning.recompute import Activated

# V is used as long as it has at most so many elements for each chosen weight (benchmarks/sparse.py).
BLOCK_LIMIT = 75
# Weights multiplied at a time, so that what is gathered for them stays small.
CHUNK_SIZE = 256


class SparseDelta(nn.Module):
    """Trainable additions to chosen weights of a ``(out_features, in_features)`` matrix, zero at first."""

    rows: Tensor
    columns: Tensor
    row_of: Tensor
    column_of: Tensor

    def __init__(self, positions: Tensor, in_features: int, device: torch.device | None = None) -> None:
        """``positions``: int64 flat row-major positions in the matrix, without repetition, at least one."""
        super().__init__()
        self.in_features = in_features
        positions = positions.to(device)
        rows, row_of = torch.unique(positions // in_features, return_inverse=True)
        columns, column_of = torch.unique(positions % in_features, return_inverse=True)
        # The plan says where the values belong, so the indices are not part of the state.
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("row_of", row_of, persistent=False)
        self.register_buffer("column_of", column_of, persistent=False)
        self.values = nn.Parameter(torch.zeros(len(positions), device=device))
        self.as_block = len(rows) * len(columns) <= BLOCK_LIMIT * len(positions)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, source: Activated | None = None) -> Tensor:
        """The layer's output with the update: ``(..., I)`` to ``(..., O)``.

        Args:
            x: the layer's input.
            weight, bias: of the layer.
            source: what ``x`` was computed from, to keep nothing of ``x``.
        """
        kept = (None, None) if source is None else (source.hidden, source.activation)
        outputs: Tensor = _SparseLinear.apply(x, weight, bias, self.values, self, *kept)
        return outputs

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the update to ``y`` ``(..., O)`` in place, for the layer's input ``x`` ``(..., I)``; returns ``y``."""
        return self.add_products(y, x.index_select(-1, self.columns).to(y.dtype), self.values.to(y.dtype))

    def add_products(self, y: Tensor, x_C: Tensor, values_K: Tensor) -> Tensor:
        """``y[..., row_k] += x[..., column_k] v_k`` for every chosen weight k, all in one dtype, in place."""
        if self.as_block:
            return y.index_add_(-1, self.rows, x_C @ self._block(values_K).mT)
        rows_K = self.rows[self.row_of]
        for chunk in _chunks(values_K):
            y.index_add_(-1, rows_K[chunk], x_C.index_select(-1, self.column_of[chunk]) * values_K[chunk])
        return y

    def gradients(self, grad_y: Tensor, x_C: Tensor, values_K: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x_C`` and of ``values_K`` through ``add_products``, the second summed over all samples."""
        if self.as_block:
            grad_R = grad_y.index_select(-1, self.rows)
            grad_block = grad_R.reshape(-1, grad_R.shape[-1]).mT @ x_C.reshape(-1, x_C.shape[-1])
            return grad_R @ self._block(values_K), grad_block[self.row_of, self.column_of]
        rows_K = self.rows[self.row_of]
        grad_C = torch.zeros_like(x_C)
        # Summed over samples and tokens in fp32 at least.
        grad_K = torch.empty_like(values_K, dtype=torch.promote_types(values_K.dtype, torch.float32))
        for chunk in _chunks(values_K):
            grad_rows = grad_y.index_select(-1, rows_K[chunk])
            products = grad_rows * x_C.index_select(-1, self.column_of[chunk])
            grad_K[chunk] = products.reshape(-1, products.shape[-1]).sum(dim=0, dtype=grad_K.dtype)
            grad_C.index_add_(-1, self.column_of[chunk], grad_rows * values_K[chunk])
        return grad_C, grad_K

    def _block(self, values_K: Tensor) -> Tensor:
        """V, ``(|R|, |C|)``."""
        empty = values_K.new_zeros(len(self.rows), len(self.columns))
        return empty.index_put_((self.row_of, self.column_of), values_K)

    def add_to_weight(self, weight: Tensor, sign: int = 1) -> None:
        """Add the values, times ``sign``, to a float64 copy of the weight, in place."""
        weight[self.rows[self.row_of], self.columns[self.column_of]] += sign * self.values.double()


class _SparseLinear(torch.autograd.Function):
    """Product with the frozen weight and update in one, so that both add to one gradient of ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values_K: Tensor,
        delta: SparseDelta,
        hidden: Tensor | None,
        activation: nn.Module | None,
    ) -> Tensor:
        ctx.delta, ctx.activation, ctx.dtype = delta, activation, x.dtype
        y = F.linear(x, weight, bias)
        x_C = x.index_select(-1, delta.columns).to(y.dtype)
        # The weight is frozen, unless the user has decided otherwise.
        whole_x = x if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weight, bias, values_K, x_C if hidden is None else hidden, whole_x)
        return delta.add_products(y, x_C, values_K.to(y.dtype))

    @staticmethod
    @once_differentiable  # what is kept of x has no history, so second derivatives would lack a part
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, values_K, kept, whole_x = ctx.saved_tensors
        delta, dtype = ctx.delta, grad_y.dtype
        x_C = kept
        if ctx.activation is not None:
            # The MLP's own axes, while the layer's input comes with two.
            chosen = kept.index_select(-1, delta.columns)
            x_C = ctx.activation(chosen).reshape(-1, len(delta.columns)).to(dtype)
        grad_C, grad_K = delta.gradients(grad_y, x_C, values_K.to(dtype))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ weight.to(dtype)).index_add_(-1, delta.columns, grad_C).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            flat_x = whole_x.reshape(-1, whole_x.shape[-1]).to(dtype)
            grad_weight = (grad_y.reshape(-1, grad_y.shape[-1]).mT @ flat_x).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(dim=0, dtype=bias.dtype)
        return grad_x, grad_weight, grad_bias, grad_K.to(values_K.dtype), None, None, None


def _chunks(values_K: Tensor) -> list[slice]:
    return [slice(start, start + CHUNK_SIZE) for start in range(0, len(values_K), CHUNK_SIZE)]
