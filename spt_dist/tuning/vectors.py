"""Chosen entries of a vector: a whole bias or norm weight, or some of its entries."""

import torch
from torch import Tensor, nn


class VectorDelta(nn.Module):
    """Trainable additions to chosen entries of a vector, zero at first."""

    positions: Tensor

    def __init__(self, positions: Tensor, device: torch.device | None = None) -> None:
        """``positions``: int64 positions in the vector, without repetition, at least one."""
        super().__init__()
        self.register_buffer("positions", positions.to(device), persistent=False)
        self.values = nn.Parameter(torch.zeros(len(positions), device=device))

    def forward(self, vector: Tensor) -> Tensor:
        """The vector with the values added, same shape and dtype."""
        return vector.index_add(0, self.positions, self.values.to(vector.dtype))
