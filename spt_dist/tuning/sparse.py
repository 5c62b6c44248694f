"""Single weights of a matrix, tuned without a dense gradient.

The chosen weights lie in few rows R and columns C. With V the small |R| x |C| matrix that holds the trainable values
at their places and zero elsewhere, ``y[..., R] += x[..., C] V^T`` is the exact update: autograd does the rest, only the
columns C of ``x`` are kept for the backward pass, and the frozen weight is neither copied nor touched.
"""

import torch
from torch import Tensor, nn


class SparseBlock(nn.Module):
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

    def block(self) -> Tensor:
        """V, ``(|R|, |C|)`` in the dtype of ``values``; differentiable."""
        empty = self.values.new_zeros(len(self.rows), len(self.columns))
        return empty.index_put((self.row_of, self.column_of), self.values)

    def add_to(self, outputs: Tensor, x: Tensor) -> Tensor:
        """Add the update ``(..., out_features)`` for the layer's input ``x`` ``(..., in_features)`` in place."""
        update = x.index_select(-1, self.columns) @ self.block().mT.to(x.dtype)
        return outputs.index_add_(-1, self.rows, update.to(outputs.dtype))

    def add_to_weight(self, weight: Tensor) -> None:
        """Add the values to a float64 copy of the weight, in place."""
        weight[self.rows[self.row_of], self.columns[self.column_of]] += self.values.double()
