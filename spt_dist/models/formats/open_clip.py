"""Vision towers of CLIP under OpenAI's names, as open_clip writes them, alone or beside the text's tower."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.class_position import POSITIONS, TOKEN, take_in_three_axes
from spt_dist.models.formats.prefixes import rename_prefix
from spt_dist.models.formats.projection import leave_text_tower, take_projection
from spt_dist.models.formats.source import Draft, Shape

NAME = "open_clip"
_TOWER = "visual."
_TABLES = {"class_embedding": TOKEN, "positional_embedding": POSITIONS}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_MODULES = {"conv1.": "patch_embed.proj.", "ln_pre.": "norm_pre.", "ln_post.": "norm."}
_MODULES_OF_A_BLOCK = {
    "ln_1.": "norm1.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ls_1.": "ls1.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ls_2.": "ls2.",
}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether the vision tower's first block is there."""
    return _TOWER + "transformer.resblocks.0.ln_1.weight" in names


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Take the vision tower; ``visual.proj`` is the head where it fits."""
    leave_text_tower(draft)
    for name in draft.rest():
        inner = name.removeprefix(_TOWER)
        if inner == name:
            continue
        if inner == "proj":
            take_projection(draft, name, wanted, is_transposed=True)
        elif inner in _TABLES:
            take_in_three_axes(draft, _TABLES[inner], name)
        else:
            draft.take(_to_timm(inner), name)


def _to_timm(inner: str) -> str:
    found = _BLOCK.fullmatch(inner)
    stem, own, renamed = (f"blocks.{found[1]}.", found[2], _MODULES_OF_A_BLOCK) if found else ("", inner, _MODULES)
    return stem + rename_prefix(own, renamed)
