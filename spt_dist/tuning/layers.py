"""Linear layers with tuning modules in place of plain ones.

A tuned layer holds the very parameters of the layer it replaces, frozen and under their old names, so state dicts of
the backbone keep their keys and code that looks at ``weight`` or ``in_features`` still finds them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.tuning.entries import EntryDelta
from spt_dist.tuning.lora import LowRank
from spt_dist.tuning.recompute import Activated
from spt_dist.tuning.sparse import SparseDelta
from spt_dist.tuning.structured import StructuredModule

# What a tuned layer has beside what it took over from the plain one.
_OWN_ATTRIBUTES = ("plain_class", "structured", "row_ranges", "sparse", "bias_delta", "dropout", "drop_path")


class TunedLinear(nn.Linear):
    """``nn.Linear`` with structured modules on some row ranges, single tuned weights, and tuned bias entries."""

    def __init__(self, linear: nn.Linear, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        """``dropout`` on what the structured modules read, ``drop_path`` on what they add, both in training."""
        from timm.layers import DropPath

        nn.Module.__init__(self)
        # All that the layer has, hooks and their handles included; but not the same dict of submodules, to which some
        # are added here.
        self.__dict__.update(linear.__dict__ | {"_modules": dict(linear._modules)})
        self.plain_class = type(linear)
        self.structured = nn.ModuleDict()
        self.row_ranges: dict[str, slice] = {}
        self.sparse: SparseDelta | None = None
        self.bias_delta: EntryDelta | None = None
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def add_structured(self, key: str, rows: slice, module: StructuredModule) -> None:
        """Update the outputs ``rows`` by ``module``, to be found under ``structured[key]``."""
        self.structured[key] = module
        self.row_ranges[key] = rows

    def forward(self, x: Tensor, source: Activated | None = None) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``; ``source``: what ``x`` was computed from, if known."""
        bias = self.bias if self.bias_delta is None else self.bias_delta(self.bias)
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

    def without_merged(self, plain: nn.Linear) -> "TunedLinear":
        """``plain``, from ``to_plain``, with the structured modules whose updates it could not take."""
        rest = TunedLinear(plain, self.dropout.p, getattr(self.drop_path, "drop_prob", 0.0)).train(self.training)
        for key, module in self.structured.items():
            if isinstance(module, StructuredModule) and not module.can_merge():
                rest.add_structured(key, self.row_ranges[key], module)
        return rest

    @torch.no_grad()
    def to_plain(self, sign: int = 1) -> nn.Linear:
        """The plain layer with every update that a weight can hold added to its own, in float64.

        Args:
            sign: -1 takes the updates away instead.
        """
        weight = self.weight.detach().double()
        for key, module in self.structured.items():
            if isinstance(module, StructuredModule) and module.can_merge():
                weight[self.row_ranges[key]] += sign * module.delta()
        if self.sparse is not None:
            self.sparse.add_to_weight(weight, sign)
        parameters = {**self._parameters, "weight": nn.Parameter(weight.to(self.weight.dtype))}
        if self.bias is not None:
            bias = self.bias.detach().double()
            bias = bias if self.bias_delta is None else self.bias_delta(bias, sign)
            parameters["bias"] = nn.Parameter(bias.to(self.bias.dtype))
        plain = self.plain_class.__new__(self.plain_class)
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in _OWN_ATTRIBUTES})
        modules = {name: module for name, module in self._modules.items() if name not in _OWN_ATTRIBUTES}
        plain.__dict__.update(_parameters=parameters, _modules=modules)
        return plain


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
