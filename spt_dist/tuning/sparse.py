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

from spt_dist.tuning.recompute import Activated

# V is used as long as it has at most so many elements for each chosen weight (benchmarks/sparse.py).
BLOCK_LIMIT = 150
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

    def add_to(self, outputs: Tensor, x: Tensor, source: Activated | None = None) -> Tensor:
        """Add the update in place.

        Args:
            outputs: of the layer, ``(..., O)``; returned with the update.
            x: the layer's input, ``(..., I)``.
            source: what ``x`` was computed from, to keep nothing of ``x``.
        """
        kept = (None, None) if source is None else (source.hidden, source.activation)
        if self.as_block:
            updated: Tensor = _AddBlock.apply(outputs, x, self.block(), self.rows, self.columns, *kept)
        else:
            places = (self.rows[self.row_of], self.column_of, self.columns)
            updated = _AddProducts.apply(outputs, x, self.values, *places, *kept)
        return updated

    def block(self) -> Tensor:
        """V, ``(|R|, |C|)`` in the dtype of ``values``; differentiable."""
        empty = self.values.new_zeros(len(self.rows), len(self.columns))
        return empty.index_put((self.row_of, self.column_of), self.values)

    def add_to_weight(self, weight: Tensor, sign: int = 1) -> None:
        """Add the values, times ``sign``, to a float64 copy of the weight, in place."""
        weight[self.rows[self.row_of], self.columns[self.column_of]] += sign * self.values.double()


class _AddBlock(torch.autograd.Function):
    """``y[..., R] += x[..., C] V^T`` in place. (torch's own ``index_add_`` would keep what it adds.)"""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        block_RC: Tensor,
        rows_R: Tensor,
        columns_C: Tensor,
        hidden: Tensor | None,
        activation: nn.Module | None,
    ) -> Tensor:
        ctx.activation, ctx.in_features, ctx.dtypes = activation, x.shape[-1], (x.dtype, block_RC.dtype)
        x_C, block_RC = x.index_select(-1, columns_C).to(y.dtype), block_RC.to(y.dtype)
        ctx.save_for_backward(block_RC, rows_R, columns_C, x_C if hidden is None else hidden)
        y.index_add_(-1, rows_R, x_C @ block_RC.mT)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable  # what is kept of x has no history, so second derivatives would lack a part
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        block_RC, rows_R, columns_C, kept = ctx.saved_tensors
        x_dtype, block_dtype = ctx.dtypes
        grad_R = grad_y.index_select(-1, rows_R)
        x_C = _recall(kept, columns_C, ctx.activation, grad_y.dtype)
        grad_block = grad_R.reshape(-1, grad_R.shape[-1]).mT @ x_C.reshape(-1, x_C.shape[-1])
        grad_x = _scatter(grad_R @ block_RC, columns_C, ctx.in_features)
        return grad_y, grad_x.to(x_dtype), grad_block.to(block_dtype), None, None, None, None


class _AddProducts(torch.autograd.Function):
    """``y[..., row_k] += x[..., column_k] v_k`` for every chosen weight k, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        values_K: Tensor,
        row_K: Tensor,
        column_of_K: Tensor,
        columns_C: Tensor,
        hidden: Tensor | None,
        activation: nn.Module | None,
    ) -> Tensor:
        ctx.activation, ctx.in_features, ctx.dtypes = activation, x.shape[-1], (x.dtype, values_K.dtype)
        x_C, values_K = x.index_select(-1, columns_C).to(y.dtype), values_K.to(y.dtype)
        ctx.save_for_backward(values_K, row_K, column_of_K, columns_C, x_C if hidden is None else hidden)
        for chunk in _chunks(values_K):
            y.index_add_(-1, row_K[chunk], x_C.index_select(-1, column_of_K[chunk]) * values_K[chunk])
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable  # what is kept of x has no history, so second derivatives would lack a part
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        values_K, row_K, column_of_K, columns_C, kept = ctx.saved_tensors
        x_C = _recall(kept, columns_C, ctx.activation, grad_y.dtype)
        grad_C = torch.zeros_like(x_C)
        # Summed over samples and tokens in fp32 at least.
        grad_K = torch.empty_like(values_K, dtype=torch.promote_types(values_K.dtype, torch.float32))
        for chunk in _chunks(values_K):
            grad_rows = grad_y.index_select(-1, row_K[chunk])
            products = grad_rows * x_C.index_select(-1, column_of_K[chunk])
            grad_K[chunk] = products.reshape(-1, products.shape[-1]).sum(dim=0, dtype=grad_K.dtype)
            grad_C.index_add_(-1, column_of_K[chunk], grad_rows * values_K[chunk])
        grad_x = _scatter(grad_C, columns_C, ctx.in_features)
        x_dtype, values_dtype = ctx.dtypes
        return grad_y, grad_x.to(x_dtype), grad_K.to(values_dtype), None, None, None, None, None


def _recall(kept: Tensor, columns_C: Tensor, activation: nn.Module | None, dtype: torch.dtype) -> Tensor:
    """The chosen columns of a layer's input, from themselves or from what the input was computed from."""
    return kept if activation is None else activation(kept.index_select(-1, columns_C)).to(dtype)


def _scatter(values_C: Tensor, columns_C: Tensor, num_columns: int) -> Tensor:
    """``(..., C)`` values at their columns of ``(..., num_columns)`` zeros."""
    return values_C.new_zeros(*values_C.shape[:-1], num_columns).index_copy_(-1, columns_C, values_C)


def _chunks(values_K: Tensor) -> list[slice]:
    return [slice(start, start + CHUNK_SIZE) for start in range(0, len(values_K), CHUNK_SIZE)]
