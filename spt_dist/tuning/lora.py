"""Low-rank update of one weight matrix.

Shape suffixes: I in_features, O out_features, R rank; ``...`` any leading axes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.tuning.recompute import Activated, project
from spt_dist.tuning.structured import ModuleSpec, StructuredModule


class LowRank(StructuredModule):
    """``x -> x down^T up^T``: the update ``W + up down`` of LoRA (Hu et al. 2021, section 4.1) with scale 1.

    ``down`` is Kaiming-uniform and ``up`` zero, so that the update is exactly zero at first; ``init="normal"`` draws
    both from N(0, 0.02).
    """

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(spec.rank, spec.in_features, device=spec.device))
        self.up = nn.Parameter(torch.zeros(spec.out_features, spec.rank, device=spec.device))
        init_projections(self.down, self.up, spec.init)

    def forward(self, inputs: Tensor, source: Activated | None = None) -> Tensor:
        """``(..., I)`` to ``(..., O)``; ``source``: what ``inputs`` are computed from, to save memory."""
        return F.linear(project(inputs, self.down, source), self.up.to(inputs.dtype))

    def delta(self) -> Tensor:
        """The update of the weight, ``(O, I)`` float64."""
        return self.up.double() @ self.down.double()


def init_projections(down: Tensor, up: Tensor, init: str) -> None:
    """Draw the two matrices of a bottleneck in place; see ``ModuleOptions.init``."""
    if init == "normal":
        nn.init.trunc_normal_(down, std=0.02)
        nn.init.trunc_normal_(up, std=0.02)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.zeros_(up)
