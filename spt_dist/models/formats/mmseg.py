"""The plain ViT of mmsegmentation, alone or in a segmentor (names with ``backbone.`` before them keep it)."""

from collections.abc import Mapping

from spt_dist.models.formats.source import Draft, Shape
from spt_dist.models.mmseg_names import MMSEG, naming_of, to_timm

NAME = MMSEG


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether the first block has mmseg's name for query, key and value."""
    return naming_of(names) == MMSEG


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Rename; the values are laid out as timm's.

    Raises:
        UserError: a name of the backbone that mmseg's plain ViT does not have.
    """
    for target, name in to_timm({name: name for name in draft.shapes}).items():
        draft.take(target, name)
