"""Vision towers of CLIP and SigLIP as Hugging Face's transformers writes them, alone or beside the text's tower."""

import re
from collections.abc import Mapping
from math import prod

from spt_dist.models.formats.class_position import POSITIONS, TOKEN, take_in_three_axes
from spt_dist.models.formats.joining import QKV_JOINED, take_joined
from spt_dist.models.formats.prefixes import find_prefix, rename_prefix
from spt_dist.models.formats.projection import TEXT_TOWER, take_projection
from spt_dist.models.formats.rearrange import patches_unrolled, rows
from spt_dist.models.formats.source import Draft, Shape

NAME = "Hugging Face's CLIP"
# The tower alone has no prefix since transformers 5.
_TOWERS = ("vision_model.", "")
_PATCHES = "embeddings.patch_embedding.weight"
_TABLES = {"embeddings.class_embedding": TOKEN, "embeddings.position_embedding.weight": POSITIONS}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_PART = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
_PATCH_EMBED = "patch_embed.proj."
_MODULES = {
    "embeddings.patch_embedding.": _PATCH_EMBED,
    "pre_layrnorm.": "norm_pre.",
    "post_layernorm.": "norm.",
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.": "attn_pool.mlp.",
}
_MODULES_OF_A_LAYER = {"layer_norm1.": "norm1.", "self_attn.out_proj.": "attn.proj.", "layer_norm2.": "norm2."}
_POOLING = "head.attention.in_proj_"
_BESIDE = ("text_model.", "text_projection.", "logit_scale", "logit_bias")


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether a vision tower's first layer is there."""
    return _tower_of(names) is not None


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Take the vision tower, query, key and value joined; ``visual_projection`` is the head where it fits."""
    tower = _tower_of(draft.shapes)
    assert tower is not None
    for name in draft.shapes:
        inner = name.removeprefix(tower)
        if name == "visual_projection.weight":
            take_projection(draft, name, wanted)
        elif name.startswith(_BESIDE):
            draft.leave(name, TEXT_TOWER)
        elif tower and inner == name:
            continue
        elif inner == "embeddings.position_ids":
            draft.leave(name, "counts the positions")
        elif inner in _TABLES:
            take_in_three_axes(draft, _TABLES[inner], name)
        elif inner == _PATCHES:
            _take_patch_embedding(draft, name, wanted)
        elif inner.startswith(_POOLING):
            _split_pooling(draft, name, inner.removeprefix(_POOLING))
        else:
            _take_in_tower(draft, tower, inner)


def _tower_of(names: Mapping[str, Shape]) -> str | None:
    return find_prefix(names, _TOWERS, _PATCHES, "encoder.layers.0.self_attn.q_proj.weight")


def _take_patch_embedding(draft: Draft, name: str, wanted: Mapping[str, Shape]) -> None:
    """SigLIP 2's for any aspect ratio is a linear layer, whose inputs are rows of pixels, channels last."""
    shape, kernel = draft.shapes[name], wanted.get(_PATCH_EMBED + "weight", ())
    if len(shape) == 2 and len(kernel) == 4 and shape[1] == prod(kernel[1:]):
        new_shape = (shape[0], *kernel[1:])
        draft.make(_PATCH_EMBED + "weight", [name], new_shape, patches_unrolled(new_shape), "channels first")
    else:
        draft.take(_PATCH_EMBED + "weight", name)


def _take_in_tower(draft: Draft, tower: str, inner: str) -> None:
    layer = _LAYER.fullmatch(inner)
    stem, own, renamed = (f"blocks.{layer[1]}.", layer[2], _MODULES_OF_A_LAYER) if layer else ("", inner, _MODULES)
    part = _PART.fullmatch(own) if layer else None
    if part is None:
        draft.take(stem + rename_prefix(own, renamed), tower + inner)
    elif part[1] == "q":
        names = [f"{tower}{inner.removesuffix(own)}self_attn.{letter}_proj.{part[2]}" for letter in "qkv"]
        take_joined(draft, f"{stem}attn.qkv.{part[2]}", names, QKV_JOINED)


def _split_pooling(draft: Draft, name: str, kind: str) -> None:
    """timm's pooling by attention has query apart, key and value joined; here all three are."""
    count, *others = draft.shapes[name] or (0,)
    width = count // 3
    for target, start, stop in (("q", 0, width), ("kv", width, count)):
        shape = (stop - start, *others)
        draft.make(f"attn_pool.{target}.{kind}", [name], shape, rows(start, stop), "q, k, v split")
