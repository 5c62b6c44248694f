"""Depthwise and pointwise convolutions with tuning modules in place of plain ones.

A pointwise convolution multiplies the channels of each place by a matrix, so its modules are what they are on a Linear
layer. A depthwise one multiplies the patch around each place, channel by channel, by a row of its matrix, which is
small: what modules make of it is added to the kernel before the image is seen.

Shape suffixes: B batch, C channels in, O channels out, H height, W width, I columns of the weight as a matrix.
"""

import torch
from torch import Tensor, nn

from spt_dist.models.layers import matrix_kind
from spt_dist.tuning.entries import EntryDelta
from spt_dist.tuning.structured import StructuredModule
from spt_dist.tuning.tuned import TunedLayer


class TunedConv2d(TunedLayer, nn.Conv2d):
    """A depthwise or pointwise ``nn.Conv2d`` with at most one structured module, and tuned weights and bias entries."""

    def __init__(self, conv: nn.Module, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        """As ``TunedLayer``."""
        super().__init__(conv, dropout, drop_path)
        self.is_depthwise = matrix_kind(conv) == "depthwise"
        self.weight_delta: EntryDelta | None = None

    def add_structured(self, key: str, rows: slice, module: StructuredModule) -> None:
        """As ``TunedLayer.add_structured``; ``rows`` are all. A depthwise one takes what has a place in its kernel."""
        assert not self.structured and (module.reads_output or module.can_merge() or not self.is_depthwise)
        super().add_structured(key, rows, module)

    def tune_weights(self, positions: Tensor, device: torch.device) -> None:
        """As ``TunedLayer.tune_weights``."""
        self.weight_delta = EntryDelta(positions, device)

    def with_single_weights(self, weight: Tensor, sign: int) -> Tensor:
        """As ``TunedLayer.with_single_weights``."""
        return weight if self.weight_delta is None else self.weight_delta(weight, sign)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, H', W')``."""
        x_BCHW, weight = input, self.weight if self.weight_delta is None else self.weight_delta(self.weight)
        module = next(iter(self.structured.values()), None)
        assert module is None or isinstance(module, StructuredModule)
        in_kernel = module is not None and self.is_depthwise and not module.reads_output
        # Dropout and drop-path are on the module's own input and output, which one kernel for both does not have.
        if in_kernel and not (self.training and self._is_random()):
            assert module is not None
            return self._conv_forward(x_BCHW, weight + self._kernel(module), self.tuned_bias())
        y_BOHW = self._conv_forward(x_BCHW, weight, self.tuned_bias())
        if module is None:
            return y_BOHW
        if in_kernel:
            update_BOHW = self._conv_forward(self.dropout(x_BCHW), self._kernel(module), None)
        else:
            inputs = y_BOHW if module.reads_output else x_BCHW[:, :, :: self.stride[0], :: self.stride[1]]
            update_BOHW = module(self.dropout(inputs).movedim(1, -1)).movedim(-1, 1)
        return y_BOHW + self.drop_path(update_BOHW).to(y_BOHW.dtype)

    def _is_random(self) -> bool:
        return self.dropout.p > 0 or not isinstance(self.drop_path, nn.Identity)

    def _kernel(self, module: StructuredModule) -> Tensor:
        """What the module adds to the weight, in its shape and dtype: what it makes of the unit vectors."""
        size_I = self.weight[0].numel()
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(self.weight.device.type, enabled=False):
            # A call rather than `delta`, so that engines that spread parameters gather the module's.
            columns_IO = module(torch.eye(size_I, dtype=dtype, device=self.weight.device))
        return columns_IO.mT.reshape(self.weight.shape).to(self.weight.dtype)
