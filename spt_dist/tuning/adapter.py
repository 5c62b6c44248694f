"""Bottleneck adapter of one weight matrix.

Shape suffixes: O out_features, R rank (the bottleneck's width); ``...`` any leading axes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.tuning.lora import init_projections
from spt_dist.tuning.structured import ModuleSpec, StructuredModule


class Adapter(StructuredModule):
    """``z -> GELU(z down^T + down_bias) up^T + up_bias``, added to the layer's output ``z``, as in SPT's code.

    Sequential, that is behind the layer; or parallel to it, reading its input, where the spec says so and the matrix is
    square. ``up`` and the biases are zero at first, so that nothing changes; ``init="normal"`` draws both matrices.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.reads_output = not (spec.parallel and spec.in_features == spec.out_features)
        self.down = nn.Parameter(torch.empty(spec.rank, spec.out_features, device=spec.device))
        self.down_bias = nn.Parameter(torch.zeros(spec.rank, device=spec.device))
        self.up = nn.Parameter(torch.zeros(spec.out_features, spec.rank, device=spec.device))
        self.up_bias = nn.Parameter(torch.zeros(spec.out_features, device=spec.device))
        init_projections(self.down, self.up, spec.init)

    def forward(self, inputs: Tensor) -> Tensor:
        """``(..., O)`` to ``(..., O)``."""
        dtype = inputs.dtype
        hidden = F.gelu(F.linear(inputs, self.down.to(dtype), self.down_bias.to(dtype)))
        return F.linear(hidden, self.up.to(hidden.dtype), self.up_bias.to(hidden.dtype))
