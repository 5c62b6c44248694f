"""DINOv2's backbones, with and without register tokens, and with SwiGLU in the giant's MLPs."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.class_position import REGISTERS
from spt_dist.models.formats.pre_training import MASKED
from spt_dist.models.formats.source import Draft, Shape

NAME = "DINOv2"
_GATED = re.compile(r"(blocks\.\d+\.mlp\.)(w12|w3)(\..+)")
# timm's GluMlp splits the first layer's rows as DINOv2 does: those of the gate come first.
_LAYERS = {"w12": "fc1", "w3": "fc2"}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether there is a token for masked patches, and layer scales under timm's name (DINOv3 has no positions)."""
    return all(name in names for name in ("mask_token", "pos_embed", "blocks.0.ls1.gamma"))


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Rename the giant's MLPs and the registers."""
    for name in draft.shapes:
        found = _GATED.fullmatch(name)
        if found:
            draft.take(found[1] + _LAYERS[found[2]] + found[3], name)
        elif name == "mask_token":
            draft.leave(name, MASKED)
        elif name == "register_tokens":
            draft.take(REGISTERS, name)
