"""Linear layers with tuning modules in place of plain ones.

A tuned layer holds the very parameters of the layer it replaces, frozen and under their old names, so state dicts of
the backbone keep their keys and code that looks at ``weight`` or ``in_features`` still finds them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.tuning.entries import EntryDelta
from spt_dist.tuning.lora import LowRank
from spt_dist.tuning.sparse import SparseBlock


class TunedLinear(nn.Linear):
    """``nn.Linear`` with low-rank updates of some row ranges, single tuned weights, and tuned bias entries."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.low_rank = nn.ModuleDict()
        self.row_ranges: dict[str, slice] = {}
        self.sparse: SparseBlock | None = None
        self.bias_delta: EntryDelta | None = None
        self.train(linear.training)

    def add_low_rank(self, key: str, rows: slice, rank: int) -> None:
        """Update ``weight[rows]`` by a module of ``rank``, to be found under ``low_rank[key]``."""
        self.low_rank[key] = LowRank(self.in_features, rows.stop - rows.start, rank, self.weight.device)
        self.row_ranges[key] = rows

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        bias = self.bias if self.bias_delta is None else self.bias_delta(self.bias)
        y = F.linear(x, self.weight, bias)
        for key, module in self.low_rank.items():
            rows = self.row_ranges[key]
            if rows.stop - rows.start == self.out_features:
                y = y + module(x)
            else:
                y[..., rows] += module(x)
        return y if self.sparse is None else self.sparse.add_to(y, x)

    @torch.no_grad()
    def to_plain(self) -> nn.Linear:
        """The plain layer that computes the same: every update added to the weights, in float64."""
        weight = self.weight.detach().double()
        for key, module in self.low_rank.items():
            assert isinstance(module, LowRank)
            weight[self.row_ranges[key]] += module.delta()
        if self.sparse is not None:
            self.sparse.add_to_weight(weight)
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to(self.weight.dtype))
        if self.bias is not None:
            bias = self.bias.detach().double()
            bias = bias if self.bias_delta is None else self.bias_delta(bias)
            plain.bias = nn.Parameter(bias.to(self.bias.dtype))
        return plain.train(self.training)
