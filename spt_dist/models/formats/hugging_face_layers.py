"""What ViTs, Swins and ConvNeXts have in common in the files of Hugging Face's transformers.

Its version 5 renamed most of a layer, and still writes the earlier names into files; its models' state dicts have the
others. Both are known here.
"""

from collections.abc import Iterator, Mapping, Sequence

from spt_dist.models.formats.joining import QKV_JOINED, take_joined
from spt_dist.models.formats.pre_training import DECODER, MASKED
from spt_dist.models.formats.prefixes import find_prefix, rename_prefix
from spt_dist.models.formats.source import Draft

_GATE_JOINED = "gate and values joined"
_QKV, _QKV_5, _GATED_5 = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# The first of the parts that are one in timm: all of them, what they are, and how.
_JOINED = {
    _QKV[0]: (_QKV, "attn.qkv", QKV_JOINED),
    _QKV_5[0]: (_QKV_5, "attn.qkv", QKV_JOINED),
    _GATED_5[0]: (_GATED_5, "mlp.fc1", _GATE_JOINED),
}
_LATER = {*_QKV[1:], *_QKV_5[1:], *_GATED_5[1:]}
_MODULES = {
    "attention.output.dense.": "attn.proj.",
    "attention.o_proj.": "attn.proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
}


def walk_tower(draft: Draft, towers: Sequence[str], mark: str, heads: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Take the heads, leave what neither the model nor a head reads, and name what else is of the tower.

    Args:
        draft: that has one of ``towers``.
        towers: what may be before a tower's names; empty where it is alone.
        mark: a name within each tower.
        heads: how the file's heads begin -> timm's names.

    Yields:
        The name in the file, and the same within the tower. What is of no tower stays.
    """
    tower = find_prefix(draft.shapes, towers, mark)
    assert tower is not None
    for name in draft.rest():
        inner = name.removeprefix(tower)
        if name.startswith(tuple(heads)):
            draft.take(rename_prefix(name, heads), name)
        elif name.startswith("decoder."):
            draft.leave(name, DECODER)
        elif tower and inner == name:
            continue
        elif inner == "embeddings.mask_token":
            draft.leave(name, MASKED)
        elif inner.startswith("pooler."):
            draft.leave(name, "pooler, which timm's models have not and no head reads")
        else:
            yield name, inner


def take_in_layer(draft: Draft, name: str, block: str, own: str, modules: Mapping[str, str]) -> None:
    """Take a tensor of a Transformer's layer; query, key and value with the first of them, as one.

    Args:
        draft: that has it.
        name: in the file.
        block: before timm's names of the same layer ("blocks.0.").
        own: the end of ``name``, within the layer.
        modules: how names within the layer begin -> timm's, beside those of every Transformer.
    """
    module, _, kind = own.rpartition(".")
    part = module.rpartition(".")[2]
    if part in _JOINED:
        parts, target, how = _JOINED[part]
        before = name.removesuffix(f"{part}.{kind}")
        take_joined(draft, f"{block}{target}.{kind}", [f"{before}{each}.{kind}" for each in parts], how)
    elif part not in _LATER:
        draft.take(block + rename_prefix(own, {**_MODULES, **modules}), name)
