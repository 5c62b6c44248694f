"""Low-rank update of one weight matrix.

Shape suffixes: I in_features, O out_features, R rank; ``...`` any leading axes.
"""

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """``x -> x down^T up^T``: the update ``W + up down`` of LoRA (Hu et al. 2021, section 4.1) with scale 1.

    ``down`` is Kaiming-uniform and ``up`` zero, so that the update is exactly zero at first.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.up = nn.Parameter(torch.zeros(out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        return x @ self.down.mT.to(x.dtype) @ self.up.mT.to(x.dtype)

    def delta(self) -> Tensor:
        """The update of the weight, ``(O, I)`` float64."""
        return self.up.double() @ self.down.double()
