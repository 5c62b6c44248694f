"""One forward of the backbone for samples of several tasks.

Shape suffixes: B batch, K classes; ``...`` any leading axes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.tuning.layers import TunedLinear
from spt_dist.tuning.multitask.slicing import Slicing, is_stackable, overridden, run_head, run_trunk
from spt_dist.tuning.multitask.variant import Variant

# A module for some samples, and those samples.
_Share = tuple[nn.Module, slice]


@dataclass(frozen=True)
class Part:
    """Neighbouring samples of a batch that belong to one task."""

    variant: Variant
    rows: slice


def run_mixed(backbone: nn.Module, parts: Sequence[Part], images: Tensor, slicing: Slicing) -> list[Tensor]:
    """The logits ``(B_i, K_i)`` of each part, with one pass of all samples through the backbone.

    Where tasks differ, each part goes through its own task's module; but Linear layers multiply all samples by the
    frozen weight at once, and the tasks' updates are added. If ``slicing`` does not allow that, each part takes a pass
    of its own. The backbone's modules get another ``forward`` until this returns or raises.

    Args:
        backbone: the plain model.
        parts: in the order of ``images``, which they cover.
        images: ``(B, C, H, W)``.
        slicing: of the backbone, for images of this size.
    """
    attributes = _attributes(backbone, parts, len(images), slicing)
    if attributes is None:
        return [part.variant(images[part.rows]) for part in parts]
    with overridden(attributes):
        features = run_trunk(backbone, images)
    return [run_head(part.variant.model, features[part.rows]) for part in parts]


def _attributes(
    backbone: nn.Module, parts: Sequence[Part], num_samples: int, slicing: Slicing
) -> list[tuple[nn.Module, str, Any]] | None:
    """What the backbone's modules shall have instead of their own, or ``None`` if the parts need separate passes."""
    tokens = sorted(set().union(*(part.variant.own_parameters for part in parts)))
    points = {slicing.point_for(name) for part in parts for name in part.variant.changed}
    if not slicing.arguments or "" in points or not all(is_stackable(backbone.get_parameter(name)) for name in tokens):
        return None
    attributes: list[tuple[nn.Module, str, Any]] = [(backbone, name, _stack(parts, name)) for name in tokens]
    for point in points - {None}:
        assert point is not None
        module = backbone.get_submodule(point)
        shares = [(part.variant.model.get_submodule(point), part.rows) for part in parts]
        if all(_has_weights_of(other, module) for other, _ in shares):
            forward = _multiply_once(module, shares, num_samples)
        else:
            forward = _run_apart(shares, num_samples, slicing.arguments[point])
        attributes.append((module, "forward", forward))
    return attributes


def _stack(parts: Sequence[Part], name: str) -> Tensor:
    """The parts' values of one of the root's parameters, one a sample."""
    values = ((getattr(part.variant.model, name), part.rows) for part in parts)
    return torch.cat([value.expand(rows.stop - rows.start, *value.shape[1:]) for value, rows in values])


def _has_weights_of(other: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` is a Linear layer and ``other`` the same one, tuned by additions or not at all."""
    is_tuned_one = isinstance(module, nn.Linear) and isinstance(other, TunedLinear | type(module))
    return is_tuned_one and other.weight is module.weight and other.bias is module.bias


def _multiply_once(linear: nn.Module, shares: Sequence[_Share], num_samples: int) -> Callable[[Tensor], Tensor]:
    """A Linear layer's ``forward`` with the updates of several tasks."""
    plain = linear.forward

    def forward(input: Tensor) -> Tensor:
        outputs: Tensor = plain(input)
        for layer, rows in shares:
            if isinstance(layer, TunedLinear):
                own = _scale(rows, len(input), num_samples)
                _update(layer, outputs[own], input[own])
        return outputs

    return forward


def _update(layer: TunedLinear, y: Tensor, x: Tensor) -> None:
    """Make the plain layer's outputs ``y`` ``(..., O)`` for ``x`` ``(..., I)`` the tuned one's, in place."""
    if layer.bias_delta is not None:
        y += layer.bias_delta(torch.zeros_like(layer.bias))
    updated = layer.update(y, x)
    if updated is not y:
        y.copy_(updated)


def _run_apart(shares: Sequence[_Share], num_samples: int, are_rows: Sequence[bool]) -> Callable[..., Tensor]:
    """A module's ``forward`` that runs each share's own module on its samples."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        outputs = []
        for module, rows in shares:
            own = _take(rows, num_samples, (*args, *kwargs.values()), are_rows)
            positional = [next(own) for _ in args]
            outputs.append(module(*positional, **dict(zip(kwargs, own, strict=True))))
        return torch.cat(outputs)

    return forward


def _take(rows: slice, num_samples: int, arguments: Sequence[Any], are_rows: Sequence[bool]) -> Iterator[Any]:
    for argument, is_rows in zip(arguments, are_rows, strict=True):
        yield argument[_scale(rows, len(argument), num_samples)] if is_rows else argument


def _scale(rows: slice, length: int, num_samples: int) -> slice:
    """The places of these samples on an axis with equally many places for each sample (Swin's windows)."""
    places = length // num_samples
    return slice(rows.start * places, rows.stop * places)
