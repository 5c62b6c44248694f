"""timm's own names, and those that its older releases and DeiT gave to the same tensors."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.pre_logits import leave_pre_logits
from spt_dist.models.formats.source import Draft, Shape

NAME = "timm"
_LAYER_SCALE = re.compile(r"(blocks\.\d+)\.gamma_([12])")


def recognise(names: Mapping[str, Shape]) -> bool:
    """Every file that no other format recognises is taken for timm's."""
    return True


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """DeiT III's layer scales are renamed unless the model itself has them under that name, as BEiT and EVA do."""
    leave_pre_logits(draft, wanted, "", ".")
    for name in draft.shapes:
        found = _LAYER_SCALE.fullmatch(name)
        if found and name not in wanted:
            draft.take(f"{found[1]}.ls{found[2]}.gamma", name)
