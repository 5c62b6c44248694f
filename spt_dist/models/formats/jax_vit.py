"""ViTs in ``.npz`` files of JAX: the original ones and AugReg's (vision_transformer), and big_vision's."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.class_position import POSITIONS, TOKEN
from spt_dist.models.formats.joining import QKV_JOINED
from spt_dist.models.formats.pre_logits import leave_pre_logits
from spt_dist.models.formats.prefixes import find_prefix
from spt_dist.models.formats.rearrange import as_rows, channels_first, heads_joined, heads_mixed, transposed
from spt_dist.models.formats.source import Draft, Shape

NAME = "JAX .npz"
# The weights alone; in a checkpoint of training; in one of big_vision, or of its pairs of image and text.
_PREFIXES = ("", "opt/target/", "params/", "params/img/")
# Beside such a tower: what belongs to the training, and the text's tower with temperature and bias.
_BESIDE = re.compile(r"(opt|extra|params/txt)/.+|params/[tb]|(.+_)?step")
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)")
_ATTENTION = re.compile(r"(MultiHeadDotProductAttention_[01]/)(query|key|value|out)/(kernel|bias)")
_OWN = {"kernel": "weight", "bias": "bias", "scale": "weight"}
_MODULES = {"embedding": "patch_embed.proj", "Transformer/encoder_norm": "norm", "head": "head"}
# Submodules are numbered by kind or through, as the two libraries' versions had it.
_MODULES_OF_A_BLOCK = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "LayerNorm_2": "norm2",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
    "MlpBlock_3/Dense_0": "mlp.fc1",
    "MlpBlock_3/Dense_1": "mlp.fc2",
}
_TABLES = {
    "cls": TOKEN,
    "pos_embedding": POSITIONS,
    "Transformer/posembed_input/pos_embedding": POSITIONS,
}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether there is a patch embedding of JAX's ViTs."""
    return _prefix_of(names) is not None


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Take the vision tower."""
    prefix = _prefix_of(draft.shapes)
    assert prefix is not None
    leave_pre_logits(draft, wanted, prefix, "/")
    for name in draft.rest():
        inner = name.removeprefix(prefix)
        if prefix and inner == name:
            if _BESIDE.fullmatch(name):
                draft.leave(name, "of the training, or of another tower")
        elif inner in _TABLES:
            draft.take(_TABLES[inner], name)
        else:
            _take_in_tower(draft, name, inner)


def _prefix_of(names: Mapping[str, Shape]) -> str | None:
    return find_prefix(names, _PREFIXES, "embedding/kernel")


def _take_in_tower(draft: Draft, name: str, inner: str) -> None:
    """What has no counterpart in timm's ViT is neither taken nor left."""
    block = _BLOCK.fullmatch(inner)
    attention = _ATTENTION.fullmatch(block[2]) if block else None
    if block and attention:
        _take_of_attention(draft, name, f"blocks.{block[1]}.attn.", attention)
        return
    stem, own, renamed = (f"blocks.{block[1]}.", block[2], _MODULES_OF_A_BLOCK) if block else ("", inner, _MODULES)
    module, _, kind = own.rpartition("/")
    shape = draft.shapes[name]
    if module not in renamed or kind not in _OWN:
        return
    target = f"{stem}{renamed[module]}.{_OWN[kind]}"
    if len(shape) == 4 and kind == "kernel":
        draft.make(target, [name], (shape[3], shape[2], *shape[:2]), channels_first, "channels first")
    elif len(shape) == 2 and kind == "kernel":
        draft.make(target, [name], shape[::-1], transposed, "transposed")
    else:
        draft.take(target, name)


def _take_of_attention(draft: Draft, name: str, stem: str, found: re.Match[str]) -> None:
    shape = draft.shapes[name]
    own = _OWN[found[3]]
    if found[2] == "out" and found[3] == "bias":
        draft.take(f"{stem}proj.{own}", name)
    elif found[2] == "out" and len(shape) == 3:
        new_shape = (shape[2], shape[0] * shape[1])
        draft.make(f"{stem}proj.{own}", [name], new_shape, heads_mixed, "heads joined, transposed")
    elif found[2] == "query":
        before = name.removesuffix(f"query/{found[3]}")
        names = [f"{before}{part}/{found[3]}" for part in ("query", "key", "value")]
        if len(shape) == (3 if found[3] == "kernel" else 2) and all(draft.shapes.get(each) == shape for each in names):
            rows, *others = as_rows(shape)
            how = QKV_JOINED + (", transposed" if others else "")
            draft.make(f"{stem}qkv.{own}", names, (3 * rows, *others), heads_joined, how)
