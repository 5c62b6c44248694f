"""Batch norm over the samples of all ranks, also on the CPU.

Shape suffixes: B samples, C channels.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class CpuSyncBatchNorm(_BatchNorm):
    """What torch's SyncBatchNorm, which is for GPUs alone, computes; no subclass of it, since DDP refuses those."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)`` over the samples and places of all ranks; in eval mode by the running means."""
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        inner = [axis for axis in range(input.ndim) if axis != 1]
        assert self.weight is not None and self.bias is not None
        # float64: the variance is a difference of sums.
        values = input.double()
        count = values.new_full((1,), input.numel() // input.shape[1])
        sums = torch.cat([values.sum(inner), values.square().sum(inner), count])
        total = _SumOverRanks.apply(sums) if dist.is_initialized() else sums
        num_channels = input.shape[1]
        mean_C = total[:num_channels] / total[-1]
        variance_C = total[num_channels:-1] / total[-1] - mean_C.square()
        self._follow(mean_C.detach(), variance_C.detach(), float(total[-1].detach()))
        broad = (1, -1, *[1] * (input.ndim - 2))
        scale_C = (variance_C + self.eps).rsqrt() * self.weight
        shift_C = self.bias - mean_C * scale_C
        # In fp32 at least: what is far from zero would lose its digits when the mean goes.
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        return (wide * scale_C.to(wide.dtype).view(broad) + shift_C.to(wide.dtype).view(broad)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, variance_C: Tensor, count: float) -> None:
        """Move the running means; the variance without bias, as torch does."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
        unbiased_C = variance_C * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), self.momentum)


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks of a tensor; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def synchronise(module: nn.Module, device: torch.device) -> None:
    """Let every batch norm within ``module`` take its means over the samples of all ranks, in place."""
    for child in module.modules():
        if not isinstance(child, _BatchNorm) or not child.track_running_stats:
            continue
        if device.type == "cpu":
            child.__class__ = CpuSyncBatchNorm
        elif not isinstance(child, nn.SyncBatchNorm):
            child.__class__ = nn.SyncBatchNorm
            child.process_group = None  # type: ignore[assignment]  # which is what its own constructor sets
