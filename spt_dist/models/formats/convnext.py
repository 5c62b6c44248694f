"""ConvNeXt's own files, V1 and V2."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.prefixes import rename_prefix
from spt_dist.models.formats.rearrange import of_shape
from spt_dist.models.formats.source import Draft, Shape

NAME = "ConvNeXt"
_DOWNSAMPLE = re.compile(r"downsample_layers\.(\d+)\.(.+)")
_BLOCK = re.compile(r"(stages\.\d+)\.(\d+)\.(.+)")
_IN_A_BLOCK = {
    "dwconv.": "conv_dw.",
    "pwconv1.": "mlp.fc1.",
    "pwconv2.": "mlp.fc2.",
    "grn.gamma": "mlp.grn.weight",
    "grn.beta": "mlp.grn.bias",
}
_LAST = {"norm.": "head.norm.", "head.": "head.fc."}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether the stem is among the downsampling layers."""
    return "downsample_layers.0.0.weight" in names


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Rename; GRN's ``(1, 1, 1, C)`` is ``(C,)`` in timm."""
    for name in draft.shapes:
        take_as(draft, name, name)


def take_as(draft: Draft, own_name: str, name: str) -> None:
    """Take the file's tensor ``name``, which ConvNeXt's own files call ``own_name``."""
    target, shape = _to_timm(own_name), draft.shapes[name]
    if ".grn." in own_name and shape[:-1] == (1, 1, 1):
        draft.make(target, [name], shape[-1:], of_shape(shape[-1:]), "reshaped")
    else:
        draft.take(target, name)


def _to_timm(name: str) -> str:
    between = _DOWNSAMPLE.fullmatch(name)
    if between:
        return f"stem.{between[2]}" if int(between[1]) == 0 else f"stages.{between[1]}.downsample.{between[2]}"
    within = _BLOCK.fullmatch(name)
    stem, own, renamed = (f"{within[1]}.blocks.{within[2]}.", within[3], _IN_A_BLOCK) if within else ("", name, _LAST)
    return stem + rename_prefix(own, renamed)
