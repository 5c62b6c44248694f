"""Batches made of nested tuples, lists and mappings of tensors, with samples along axis 0."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from spt_dist.errors import UserError


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of a nested batch; mappings become dicts, other leaves stay."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(item, function) for key, item in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(item, function) for item in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(item, function) for item in tree)
    return tree


def take(tree: Any, rows: slice) -> Any:
    """Some samples of a nested batch; tensors without axes are for all samples and stay whole."""
    return map_tensors(tree, lambda tensor: tensor[rows] if tensor.ndim else tensor)


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
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)
