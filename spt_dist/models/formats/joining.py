"""Tensors that files have apart and timm's layers as the rows of one."""

from collections.abc import Sequence

from spt_dist.models.formats.rearrange import joined
from spt_dist.models.formats.source import Draft

QKV_JOINED = "q, k, v joined"


def take_joined(draft: Draft, target: str, names: Sequence[str], how: str) -> None:
    """Take ``names``' tensors of one shape ``(O, ...)`` as ``target``'s rows, one after the other.

    If one of them is missing or of another shape, all stay under names that no model has.
    """
    shape = draft.shapes.get(names[0])
    if shape and all(draft.shapes.get(name) == shape for name in names):
        draft.make(target, names, (len(names) * shape[0], *shape[1:]), joined, how)
