"""What structured modules have in common.

Shape suffixes: I in_features, O out_features; ``...`` any leading axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModuleSpec:
    """What a structured module is made for.

    Attributes:
        in_features, out_features: of the weight matrix.
        rank: the module's size.
        init: see ``allocation.kinds.ModuleOptions``.
        parallel: whether a module that could read the layer's output shall read its input.
        device: of the parameters; they are fp32.
    """

    in_features: int
    out_features: int
    rank: int
    init: str = "zero"
    parallel: bool = False
    device: torch.device | None = None


class StructuredModule(nn.Module):
    """Computes what is added to the output of a layer (to the rows of one weight matrix in it).

    On a pointwise convolution the last axis is that of the channels. On a depthwise one a module that reads the output
    is used likewise; any other has to have a ``delta``, and is applied to the unit vectors for the kernel's update.

    Task files hold its parameters; it can't have buffers of its own, but for some that are not persistent and follow
    from the spec.

    Attributes:
        reads_output: whether it is given the layer's output ``(..., O)`` instead of its input ``(..., I)``.
    """

    reads_output: bool = False

    def forward(self, inputs: Tensor) -> Tensor:
        """``(..., I)``, or ``(..., O)`` if ``reads_output``, to the update ``(..., O)`` in the dtype of ``inputs``."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """The same as an update of the weight, ``(O, I)`` float64, if that is possible; then it can be merged."""
        raise NotImplementedError

    @classmethod
    def can_merge(cls) -> bool:
        """Whether a weight can hold what such modules do: whether ``delta`` has been given."""
        return cls.delta is not StructuredModule.delta
