"""DINOv3's ViTs as Hugging Face's transformers writes them, and as its models' state dicts name their tensors."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.class_position import REGISTERS, TOKEN
from spt_dist.models.formats.dinov3_projection import has_biases, take_projection
from spt_dist.models.formats.pre_training import MASKED
from spt_dist.models.formats.prefixes import find_prefix, rename_prefix
from spt_dist.models.formats.source import Draft, Shape

NAME = "Hugging Face's DINOv3"
# Of the layers alone.
_TOWERS = ("", "model.")
_MARK = "layer.0.attention.o_proj.weight"
_IN_LAYER = re.compile(r"(?:model\.)?layer\.(\d+)\.(.+)")
_PROJECTIONS = tuple(f"attention.{part}_proj." for part in "qkv")
_QUERY = "attention.q_proj.weight"
_OUTSIDE = {
    "embeddings.cls_token": TOKEN,
    "embeddings.register_tokens": REGISTERS,
    "embeddings.patch_embeddings.": "patch_embed.proj.",
}
_MODULES = {
    "attention.o_proj.": "attn.proj.",
    "layer_scale1.lambda1": "gamma_1",
    "layer_scale2.lambda1": "gamma_2",
    "mlp.down_proj.": "mlp.fc2.",
}
_PLAIN, _GATED = {"mlp.up_proj.": "mlp.fc1."}, {"mlp.gate_proj.": "mlp.fc1_g.", "mlp.up_proj.": "mlp.fc1_x."}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether there is a first layer of such a tower, and its patch embedding."""
    return "embeddings.patch_embeddings.weight" in names and find_prefix(names, _TOWERS, _MARK) is not None


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Rename the parts of each layer, query, key and value joined."""
    is_gated = any(".mlp.gate_proj." in name for name in draft.shapes)
    modules = _MODULES | (_GATED if is_gated else _PLAIN)
    for name in draft.shapes:
        found = _IN_LAYER.fullmatch(name)
        if found and found[2].startswith(_PROJECTIONS):
            _take_part(draft, wanted, f"blocks.{found[1]}.", name.removesuffix(found[2]), found[2])
        elif found:
            draft.take(f"blocks.{found[1]}.{rename_prefix(found[2], modules)}", name)
        elif name == "embeddings.mask_token":
            draft.leave(name, MASKED)
        else:
            draft.take(rename_prefix(name, _OUTSIDE), name)


def _take_part(draft: Draft, wanted: Mapping[str, Shape], block: str, layer: str, own: str) -> None:
    """All weights come with the query's. A key's bias, which no model of timm's has, stays under the file's name."""
    biases = {f"attention.{part}_proj.bias": f"{block}attn.{part}_bias" for part in "qv"}
    if own == _QUERY:
        weights = [layer + f"attention.{part}_proj.weight" for part in "qkv"]
        shape = draft.shapes[layer + own]
        if all(draft.shapes.get(name) == shape for name in weights):
            unwanted = [] if has_biases(wanted, block) else [layer + name for name in biases]
            zeros = {name: [(0, shape[0])] for name in unwanted if name in draft.shapes}
            take_projection(draft, block, weights, zeros)
    elif own in biases and has_biases(wanted, block):
        draft.take(biases[own], layer + own)
