"""Vision towers of CLIP that are timm's own models, in a file of open_clip."""

from collections.abc import Mapping

from spt_dist.models.formats.projection import leave_text_tower, take_projection
from spt_dist.models.formats.source import Draft, Shape

NAME = "open_clip with a tower of timm"
_TOWER, _HEAD = "visual.trunk.", "visual.head."


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether anything lies in such a tower."""
    return any(name.startswith(_TOWER) for name in names)


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Take the tower under timm's names; a linear projection after it is the head where it fits."""
    leave_text_tower(draft)
    for name in draft.rest():
        if name.startswith(_TOWER):
            draft.take(name.removeprefix(_TOWER), name)
        elif name == _HEAD + "proj.weight" and _HEAD + "proj.bias" not in draft.shapes:
            take_projection(draft, name, wanted)
        elif name.startswith(_HEAD):
            draft.leave(name, "projection to the space that text shares")
