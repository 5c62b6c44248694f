"""ConvNeXt, V1 and V2, as Hugging Face's transformers writes it: its own files' tensors under other names."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.convnext import take_as
from spt_dist.models.formats.hugging_face_layers import walk_tower
from spt_dist.models.formats.prefixes import find_prefix, rename_prefix
from spt_dist.models.formats.source import Draft, Shape

NAME = "Hugging Face's ConvNeXt"
_TOWERS = ("convnext.", "convnextv2.", "")
_MARK, _FIRST = "embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.dwconv.weight"
_HEADS = {"classifier.": "head.fc."}
_BETWEEN = re.compile(r"encoder\.stages\.(\d+)\.downsampling_layer\.(.+)")
_LAYER = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)")
_MODULES = {
    "embeddings.patch_embeddings.": "downsample_layers.0.0.",
    "embeddings.layernorm.": "downsample_layers.0.1.",
    "layernorm.": "norm.",
}
_MODULES_OF_A_LAYER = {
    "layernorm.": "norm.",
    "layer_scale_parameter": "gamma",
    "grn.weight": "grn.gamma",
    "grn.bias": "grn.beta",
}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether the stem's convolution and the first layer's are there."""
    return find_prefix(names, _TOWERS, _MARK, _FIRST) is not None


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Take the tower and its classifier."""
    for name, inner in walk_tower(draft, _TOWERS, _MARK, _HEADS):
        take_as(draft, _to_own_name(inner), name)


def _to_own_name(inner: str) -> str:
    between = _BETWEEN.fullmatch(inner)
    if between:
        return f"downsample_layers.{between[1]}.{between[2]}"
    layer = _LAYER.fullmatch(inner)
    if layer:
        return f"stages.{layer[1]}.{layer[2]}.{rename_prefix(layer[3], _MODULES_OF_A_LAYER)}"
    return rename_prefix(inner, _MODULES)
