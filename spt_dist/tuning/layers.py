"""Linear layers with tuning modules in place of plain ones."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.tuning.lora import LowRank
from spt_dist.tuning.recompute import Activated
from spt_dist.tuning.sparse import SparseDelta
from spt_dist.tuning.tuned import TunedLayer


class TunedLinear(TunedLayer, nn.Linear):
    """``nn.Linear`` with structured modules on some row ranges, single tuned weights, and tuned bias entries."""

    def __init__(self, linear: nn.Module, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        """As ``TunedLayer``."""
        super().__init__(linear, dropout, drop_path)
        self.sparse: SparseDelta | None = None

    def tune_weights(self, positions: Tensor, device: torch.device) -> None:
        """As ``TunedLayer.tune_weights``."""
        self.sparse = SparseDelta(positions, self.in_features, device)

    def with_single_weights(self, weight: Tensor, sign: int) -> Tensor:
        """As ``TunedLayer.with_single_weights``."""
        if self.sparse is not None:
            self.sparse.add_to_weight(weight, sign)
        return weight

    def forward(self, x: Tensor, source: Activated | None = None) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``; ``source``: what ``x`` was computed from, if known."""
        bias = self.tuned_bias()
        # With two axes outputs are no views, which must not be changed in place behind a custom function.
        rows = x.reshape(-1, self.in_features)
        if rows.dtype == torch.float32 and torch.is_autocast_enabled(rows.device.type):
            # Here and not in each product, or each would keep a copy of its own.
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        if self.sparse is not None:
            y = self.sparse.linear(rows, self.weight, bias, source)
        else:
            y = F.linear(rows, self.weight, bias)
        if self.structured:
            y = self._add_structured(y, rows, x.shape[:-1], source)
        return y.view(*x.shape[:-1], self.out_features)

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        """What modules and single weights make of the plain layer's output ``y`` for ``x``; may change ``y``."""
        if self.sparse is not None:
            y = self.sparse.add_to(y, x)
        return self._add_structured(y, x, x.shape[:-1]) if self.structured else y

    def _add_structured(self, y: Tensor, x: Tensor, leading: torch.Size, source: Activated | None = None) -> Tensor:
        """``leading``: axes of the layer's input, which modules see, and of which drop-path needs the first."""
        inputs, known = x, source
        if any(not module.reads_output for module in self.structured.values()):
            # Drawn once, so that q, k and v share it, as in the published code.
            inputs = self.dropout(x)
            known = source if inputs is x else None
        for key, module in self.structured.items():
            rows = self.row_ranges[key]
            is_whole = rows.stop - rows.start == self.out_features
            if module.reads_output:
                # What is kept for the backward pass must not be a view of what changes below.
                z = self.dropout(y if is_whole else y[..., rows].clone())
                update = module(_with_axes(z, leading))
            elif type(module) is LowRank:
                update = module(inputs, known)
            else:
                update = module(_with_axes(inputs, leading))
            update = self.drop_path(_with_axes(update, leading)).to(y.dtype)
            update = _with_axes(update, y.shape[:-1])
            if is_whole and module.reads_output:
                y = y + update  # the module has kept y
            else:
                y = y.add_(update) if is_whole else _add_rows(y, update, rows)
        return y


def _with_axes(tensor: Tensor, leading: torch.Size) -> Tensor:
    return tensor.reshape(*leading, tensor.shape[-1])


def _add_rows(y: Tensor, update: Tensor, rows: slice) -> Tensor:
    """``y[..., rows] += update`` in place."""
    if torch.compiler.is_compiling():
        y[..., rows] += update
        return y
    added: Tensor = _AddRows.apply(y, update, rows)
    return added


class _AddRows(torch.autograd.Function):
    """``y[..., rows] += update`` in place. (torch's own would copy the whole gradient of ``y``.)"""

    @staticmethod
    def forward(ctx: Any, y: Tensor, update: Tensor, rows: slice) -> Tensor:
        ctx.rows = rows
        ctx.mark_dirty(y)
        y[..., rows] += update
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return grad_y, grad_y[..., ctx.rows], None
