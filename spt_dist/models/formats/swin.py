"""Swin's own files (V1 and V2), and those of timm before 0.9: they merge patches at the end of a stage, not the start
of the next."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.source import Draft, Shape
from spt_dist.models.matrices import own_name_of

NAME = "Swin"
_DOWNSAMPLE = re.compile(r"layers\.(\d+)\.(downsample\..+)")
_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
COMPUTED = "computed from the sizes of window and image"
_HEAD = {"head.weight": "head.fc.weight", "head.bias": "head.fc.bias"}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether it is a Swin with anything that timm's names have elsewhere, or not at all."""
    is_swin = "layers.0.blocks.0.attn.qkv.weight" in names
    is_early = "layers.0.downsample.reduction.weight" in names
    return is_swin and (is_early or any(name in _HEAD or is_computed(name) for name in names))


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Rename what merges patches, and the head; leave what is computed from the window's size."""
    is_early = "layers.0.downsample.reduction.weight" in draft.shapes
    for name in draft.shapes:
        if is_computed(name):
            draft.leave(name, COMPUTED)
        elif name in _HEAD:
            draft.take(_HEAD[name], name)
        elif is_early:
            draft.take(merged_at_the_start(name), name)


def is_computed(name: str) -> bool:
    """Whether it is a buffer of a block's attention."""
    return own_name_of(name) in _BUFFERS


def merged_at_the_start(name: str) -> str:
    """``layers.0.downsample.norm.bias`` -> ``layers.1.downsample.norm.bias``; other names as they are."""
    found = _DOWNSAMPLE.fullmatch(name)
    return f"layers.{int(found[1]) + 1}.{found[2]}" if found else name
