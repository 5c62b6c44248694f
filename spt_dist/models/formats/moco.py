"""MoCo v3's pre-training files: a ViT under timm's names in ``base_encoder``, beside what it is compared with.

Files of linear probing have nothing but timm's names.
"""

from collections.abc import Mapping

from spt_dist.models.formats.source import Draft, Shape

NAME = "MoCo v3"
_ENCODER = "base_encoder."


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether a ViT's first block is in the encoder that is trained."""
    return _ENCODER + "blocks.0.attn.qkv.weight" in names


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """The encoder without its head is taken: the head is a projection for the comparison, no classifier."""
    for name in draft.shapes:
        if name.startswith(_ENCODER + "head."):
            draft.leave(name, "projection of MoCo v3")
        elif name.startswith(_ENCODER):
            draft.take(name.removeprefix(_ENCODER), name)
        elif name.startswith("momentum_encoder."):
            draft.leave(name, "momentum encoder of MoCo v3")
        elif name.startswith("predictor."):
            draft.leave(name, "predictor of MoCo v3")
