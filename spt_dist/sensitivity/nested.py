"""Batches made of nested tuples, lists and mappings of tensors, with samples along axis 0."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from spt_dist.errors import UserError


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of a nested batch; dicts keep their type, other leaves stay."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        # Of its own kind: the outputs of some models are dicts with attributes.
        mapped = copy.copy(tree) if isinstance(tree, dict) else dict(tree)
        for key, item in tree.items():
            mapped[key] = map_tensors(item, function)
        return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(item, function) for item in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(item, function) for item in tree)
    return tree


def take(tree: Any, rows: slice) -> Any:
    """Some samples of a nested batch; tensors without axes are for all samples and stay whole."""
    return map_tensors(tree, lambda tensor: tensor[rows] if tensor.ndim else tensor)


def check_separable(tree: Any) -> None:
    """Refuse what ``take`` would hand to every sample whole.

    Raises:
        UserError: a leaf is an object that holds who knows what, a number in a list, or a tensor without axes that
            gradients go through.
    """
    for leaf, is_listed in _leaves(tree):
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0 and leaf.requires_grad:
                raise UserError("there is a tensor without axes, so without samples along axis 0")
        elif leaf is not None and not isinstance(leaf, str) and (is_listed or not isinstance(leaf, (bool, int, float))):
            place = "in a list" if is_listed else "that is no tensor"
            raise UserError(f"there is a {type(leaf).__name__} {place}, which has no samples along axis 0")


def batch_size(tree: Any) -> int:
    """Number of samples of a nested batch: the length of its first tensor that has an axis.

    Raises:
        UserError: there is none.
    """
    for tensor in tensors(tree):
        if tensor.ndim:
            return len(tensor)
    raise UserError(f"batches: the inputs ({type(tree).__name__}) hold no tensor with samples along axis 0")


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a nested batch."""
    return (leaf for leaf, _ in _leaves(tree) if isinstance(leaf, Tensor))


def _leaves(tree: Any, is_listed: bool = False) -> Iterator[tuple[Any, bool]]:
    """Everything in a nested batch that is no tuple, list or mapping, and whether it stands in a tuple or list."""
    if isinstance(tree, Mapping):
        for item in tree.values():
            yield from _leaves(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _leaves(item, is_listed=True)
    else:
        yield tree, is_listed
