"""What tuned layers of all kinds have in common.

A tuned layer holds the very parameters of the layer it replaces, frozen and under their old names, so state dicts of
the backbone keep their keys and code that looks at ``weight`` or ``in_features`` still finds them.

Shape suffixes: I in_features, O out_features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.tuning.entries import EntryDelta
from spt_dist.tuning.structured import StructuredModule

# What a tuned layer has beside what it took over from the plain one.
_OWN_ATTRIBUTES = (
    "plain_class",
    "structured",
    "row_ranges",
    "sparse",
    "weight_delta",
    "bias_delta",
    "dropout",
    "drop_path",
)


class TunedLayer(nn.Module):
    """Mixed into a layer's class: structured modules on rows of its weight, single tuned weights and bias entries.

    Attributes:
        plain_class: the class of the layer that it replaces.
        structured: the structured modules.
        row_ranges: key of each module -> the rows of the weight that it updates.
        bias_delta: what is added to the bias.
        dropout: on what the structured modules read.
        drop_path: on what they add.
    """

    plain_class: type[nn.Module]
    weight: Tensor
    bias: Any  # torch's layers declare it in several ways

    def __init__(self, layer: nn.Module, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        """``dropout`` on what the structured modules read, ``drop_path`` on what they add, both in training."""
        from timm.layers import DropPath

        nn.Module.__init__(self)
        # All that the layer has, hooks and their handles included; but not the same dict of submodules, to which some
        # are added here.
        self.__dict__.update(layer.__dict__ | {"_modules": dict(layer._modules)})
        self.plain_class = type(layer)
        self.structured = nn.ModuleDict()
        self.row_ranges: dict[str, slice] = {}
        self.bias_delta: EntryDelta | None = None
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def add_structured(self, key: str, rows: slice, module: StructuredModule) -> None:
        """Update the outputs ``rows`` by ``module``, to be found under ``structured[key]``."""
        self.structured[key] = module
        self.row_ranges[key] = rows

    def tune_weights(self, positions: Tensor, device: torch.device) -> None:
        """Tune single weights: ``positions`` int64, flat row-major in the weight, without repetition, at least one."""
        raise NotImplementedError

    def with_single_weights(self, weight: Tensor, sign: int) -> Tensor:
        """A float64 copy of the weight with the single tuned weights, times ``sign``, added; may change ``weight``."""
        raise NotImplementedError

    def tuned_bias(self) -> Tensor | None:
        """The bias with what is added to it."""
        bias: Tensor | None = self.bias if self.bias_delta is None else self.bias_delta(self.bias)
        return bias

    def without_merged(self, plain: nn.Module) -> "TunedLayer":
        """``plain``, from ``to_plain``, with the structured modules whose updates it could not take."""
        rest = type(self)(plain, self.dropout.p, getattr(self.drop_path, "drop_prob", 0.0)).train(self.training)
        for key, module in self.structured.items():
            if isinstance(module, StructuredModule) and not module.can_merge():
                rest.add_structured(key, self.row_ranges[key], module)
        return rest

    @torch.no_grad()
    def to_plain(self, sign: int = 1) -> nn.Module:
        """The plain layer with every update that a weight can hold added to its own, in float64.

        Args:
            sign: -1 takes the updates away instead.
        """
        weight = self.weight.detach().double()
        for key, module in self.structured.items():
            if isinstance(module, StructuredModule) and module.can_merge():
                rows = weight[self.row_ranges[key]]
                rows += sign * module.delta().view(rows.shape)
        weight = self.with_single_weights(weight, sign)
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
