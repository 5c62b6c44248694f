"""ViT, DeiT, MAE and DINOv2 as Hugging Face's transformers writes them."""

import re
from collections.abc import Mapping

from spt_dist.models.formats.class_position import POSITIONS, REGISTERS, TOKEN
from spt_dist.models.formats.hugging_face_layers import take_in_layer, walk_tower
from spt_dist.models.formats.prefixes import find_prefix, rename_prefix
from spt_dist.models.formats.source import Draft, Shape

NAME = "Hugging Face's ViT"
_TOWERS = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", "")
_MARK = "embeddings.patch_embeddings.projection.weight"
_HEADS = {"classifier.": "head.", "cls_classifier.": "head.", "distillation_classifier.": "head_dist."}
_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)")
_MODULES = {
    "embeddings.cls_token": TOKEN,
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": REGISTERS,
    "embeddings.position_embeddings": POSITIONS,
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "layernorm.": "norm.",
}
_MODULES_OF_A_LAYER = {
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    # The giant's, whose rows of the gate come first here and in timm's GluMlp.
    "mlp.weights_in.": "mlp.fc1.",
    "mlp.weights_out.": "mlp.fc2.",
    "mlp.down_proj.": "mlp.fc2.",
}


def recognise(names: Mapping[str, Shape]) -> bool:
    """Whether there is a patch embedding of such a tower."""
    return find_prefix(names, _TOWERS, _MARK) is not None


def translate(draft: Draft, wanted: Mapping[str, Shape]) -> None:
    """Take the tower, query, key and value joined; the classifiers are heads unless they read more than timm's do."""
    _leave_wide_head(draft)
    for name, inner in walk_tower(draft, _TOWERS, _MARK, _HEADS):
        layer = _LAYER.fullmatch(inner)
        if layer:
            take_in_layer(draft, name, f"blocks.{layer[1]}.", layer[2], _MODULES_OF_A_LAYER)
        else:
            draft.take(rename_prefix(inner, _MODULES), name)


def _leave_wide_head(draft: Draft) -> None:
    """DINOv2's classifier is twice as wide as the tower."""
    kernel = draft.shapes[f"{find_prefix(draft.shapes, _TOWERS, _MARK)}{_MARK}"]
    if kernel and draft.shapes.get("classifier.weight", ())[1:] == (2 * kernel[0],):
        for name in ("classifier.weight", "classifier.bias"):
            if name in draft.shapes:
                draft.leave(name, "head that reads the mean of the patches beside the class token")
