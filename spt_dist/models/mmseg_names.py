"""Names of a plain ViT's weights: timm's, which spt_dist uses, and those of mmsegmentation's own ViT.

The values are the same: mmseg's ``nn.MultiheadAttention`` lays query, key and value out as timm's fused layer does.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from spt_dist.errors import UserError
from spt_dist.models.matrices import SEGMENTATION_HEADS, in_modules

TIMM, MMSEG = "timm", "mmseg"
BACKBONE_PREFIX = "backbone."
USUAL_HEADS = ("head", "head_dist", "fc")
# What lies between a classifier's backbone and its head.
POOLING = ("fc_norm", "pre_logits")

_OWN = ("weight", "bias")
_MODULES = {"patch_embed.proj.": "patch_embed.projection.", "norm.": "ln1."}
_MODULES_OF_A_BLOCK = {
    "norm1.": "ln1.",
    "attn.qkv.": "attn.attn.in_proj_",
    "attn.proj.": "attn.attn.out_proj.",
    "norm2.": "ln2.",
    "mlp.fc1.": "ffn.layers.0.0.",
    "mlp.fc2.": "ffn.layers.1.",
}
_TIMM_TO_MMSEG = {timm + own: mmseg + own for timm, mmseg in _MODULES.items() for own in _OWN} | {
    name: name for name in ("cls_token", "pos_embed")
}
_TIMM_TO_MMSEG_IN_A_BLOCK = {timm + own: mmseg + own for timm, mmseg in _MODULES_OF_A_BLOCK.items() for own in _OWN}
_MMSEG_TO_TIMM = {mmseg: timm for timm, mmseg in _TIMM_TO_MMSEG.items()}
_MMSEG_TO_TIMM_IN_A_BLOCK = {mmseg: timm for timm, mmseg in _TIMM_TO_MMSEG_IN_A_BLOCK.items()}
_FIRST_ATTENTION = {TIMM: "blocks.0.attn.qkv.weight", MMSEG: "layers.0.attn.attn.in_proj_weight"}

Value = TypeVar("Value")


def naming_of(names: Iterable[str]) -> str | None:
    """Whose names these are, with or without ``backbone.`` before them: "timm", "mmseg", or ``None`` for others'."""
    given = {name.removeprefix(BACKBONE_PREFIX) for name in names}
    return next((naming for naming, name in _FIRST_ATTENTION.items() if name in given), None)


def to_timm(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict of mmseg's ViT, or of a segmentor that has one, under timm's names.

    Args:
        state: name -> anything. If some names begin with ``backbone.``, the others are kept as they are; if none does,
            only those of heads are kept.

    Raises:
        UserError: a name of the backbone that mmseg's plain ViT does not have.
    """
    return _rename(state, MMSEG, "layers", "blocks", _MMSEG_TO_TIMM, _MMSEG_TO_TIMM_IN_A_BLOCK)


def to_mmseg(state: Mapping[str, Value]) -> dict[str, Value]:
    """The way back from ``to_timm``: a state dict under timm's names under those of mmseg's ViT.

    Raises:
        UserError: a name of the backbone that has no counterpart: layer scales, register tokens, norms of queries.
    """
    return _rename(state, TIMM, "blocks", "layers", _TIMM_TO_MMSEG, _TIMM_TO_MMSEG_IN_A_BLOCK)


def check_whole(names: Iterable[str]) -> None:
    """Refuse a part of a ViT under timm's names, with or without ``backbone.`` before them.

    Raises:
        UserError: names the first weight that is missing.
    """
    given = {name.removeprefix(BACKBONE_PREFIX) for name in names}
    blocks: dict[int, set[str]] = {}
    for name in given:
        first, _, rest = name.partition(".")
        number, _, own = rest.partition(".")
        if first == "blocks" and number.isdecimal():
            blocks.setdefault(int(number), set()).add(own)
    weights = {module + "weight" for module in _MODULES_OF_A_BLOCK}
    in_a_block = weights.union(*blocks.values())
    wanted = {f"blocks.{number}.{own}" for number in range(max(blocks, default=0) + 1) for own in in_a_block}
    missing = sorted((wanted | {"cls_token", "pos_embed", "patch_embed.proj.weight"}) - given)
    if missing:
        raise UserError(f"{missing[0]} and {len(missing) - 1} more weights of a plain ViT are missing")


def _rename(
    state: Mapping[str, Value],
    naming: str,
    blocks: str,
    new_blocks: str,
    new_names: Mapping[str, str],
    new_names_in_a_block: Mapping[str, str],
) -> dict[str, Value]:
    is_segmentor = any(name.startswith(BACKBONE_PREFIX) for name in state)
    renamed = {}
    for name, value in state.items():
        inner = name.removeprefix(BACKBONE_PREFIX)
        is_kept = inner == name if is_segmentor else in_modules(name, SEGMENTATION_HEADS + USUAL_HEADS + POOLING)
        if is_kept:
            renamed[name] = value
            continue
        first, _, rest = inner.partition(".")
        number, _, own = rest.partition(".")
        if first == blocks and number.isdecimal():
            stem, found = f"{new_blocks}.{number}.", new_names_in_a_block.get(own)
        else:
            stem, found = "", new_names.get(inner)
        if found is None:
            raise UserError(f"{name}: no weight of a plain ViT under {naming}'s names; nothing else can be converted")
        renamed[name.removesuffix(inner) + stem + found] = value
    return renamed
