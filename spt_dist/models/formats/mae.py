"""MAE's pre-training files: a ViT under timm's names, and a decoder that paints what was masked.

Files with the encoder alone, and those of fine-tuning, have nothing but timm's names.
"""

from collections.abc import Mapping

from spt_dist.models.formats.pre_training import MASKED
from spt_dist.models.formats.source import Draft, Shape

NAME = "MAE"


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether there is a decoder."""
    return "decoder_pos_embed" in names


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """The decoder is left, the rest has timm's names."""
    for name in draft.shapes:
        if name.startswith("decoder_"):
            draft.leave(name, "decoder of MAE")
        elif name == "mask_token":
            draft.leave(name, MASKED)
