"""Swin, V1 and V2, as Hugging Face's transformers writes it."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.hugging_face_layers import take_in_layer, walk_tower
from spt_dist.models.formats.prefixes import find_prefix, rename_prefix
from spt_dist.models.formats.source import Draft, Shape
from spt_dist.models.formats.swin import COMPUTED, is_computed, merged_at_the_start

NAME = "Hugging Face's Swin"
_TOWERS = ("swin.", "swinv2.", "")
_MARK = "encoder.layers.0.blocks.0.layernorm_before.weight"
_HEADS = {"classifier.": "head.fc."}
_BLOCK = re.compile(r"encoder\.(layers\.\d+\.blocks\.\d+\.)(.+)")
_MODULES = {
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "embeddings.norm.": "patch_embed.norm.",
    "layernorm.": "norm.",
    "encoder.": "",
}
_MODULES_OF_A_BLOCK = {
    "attention.self.continuous_position_bias_mlp.": "attn.cpb_mlp.",
    "attention.self.": "attn.",
    "attention.relative_position_bias.": "attn.",
}
# V2 has none for the keys, and timm keeps the others apart.
_BIASES_OF_V2 = {"attention.self.query.bias": "attn.q_bias", "attention.self.value.bias": "attn.v_bias"}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether the first block of the first stage is there."""
    return find_prefix(names, _TOWERS, _MARK) is not None


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Take the tower, query, key and value joined, what merges patches at the start of the next stage."""
    for name, inner in walk_tower(draft, _TOWERS, _MARK, _HEADS):
        block = _BLOCK.fullmatch(inner)
        if is_computed(name):
            draft.leave(name, COMPUTED)
        elif block is None:
            draft.take(merged_at_the_start(rename_prefix(inner, _MODULES)), name)
        elif block[2] in _BIASES_OF_V2 and name.removesuffix(block[2]) + "attention.self.key.bias" not in draft.shapes:
            draft.take(block[1] + _BIASES_OF_V2[block[2]], name)
        else:
            take_in_layer(draft, name, block[1], block[2], _MODULES_OF_A_BLOCK)
