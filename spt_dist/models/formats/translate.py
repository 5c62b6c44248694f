"""Whose file it is, by its names, and what timm calls its tensors."""

from collections.abc import Iterable, Mapping

from spt_dist.models.formats import (
    convnext,
    dinov2,
    dinov3,
    hugging_face_clip,
    hugging_face_convnext,
    hugging_face_dinov3,
    hugging_face_swin,
    hugging_face_vit,
    jax_vit,
    mae,
    mmseg,
    moco,
    open_clip,
    swin,
    timm_names,
    timm_tower,
)
from spt_dist.models.formats.class_position import fit_class_position
from spt_dist.models.formats.source import Draft, Shape, Translation
from spt_dist.models.matrices import logical_name
from spt_dist.models.weight_files import StoredWeights

# Swin's patch embedding has ViT's name in Hugging Face's files; everything is in timm's.
_HUGGING_FACE = (hugging_face_clip, hugging_face_convnext, hugging_face_swin, hugging_face_dinov3, hugging_face_vit)
_OWN = (jax_vit, mae, moco, dinov2, dinov3, swin, convnext, open_clip)
_FORMATS = (mmseg, *_OWN, timm_tower, *_HUGGING_FACE, timm_names)
# Before the names of every tensor: DistributedDataParallel, Lightning.
_WRAPPERS = ("module.", "model.")


def translate(weights: StoredWeights, wanted: Mapping[str, Shape], *, has_class_position: bool = True) -> Translation:
    """Recognise the format of a file and map its tensors to a timm model's. Nothing is read but names and shapes.

    Args:
        weights: an open file.
        wanted: names and shapes of the model's tensors, head included, without ``backbone.`` before them.
        has_class_position: whether the model's position embeddings have a row for its class token, if it has one
            (timm: ``not no_embed_class``).

    Returns:
        See ``Translation``. A name with ``backbone.`` before it in the file keeps it.

    Raises:
        UserError: names the tensor (not the file) that stands for two, or that its format does not have.
    """
    own_names = _unwrap(weights.names())
    shapes = {name: weights.shape(own_name) for name, own_name in own_names.items()}
    found = next(each for each in _FORMATS if each.recognise(shapes))
    draft = Draft(shapes, own_names)
    found.translate(draft, wanted)
    return fit_class_position(draft.finish(found.NAME), wanted, has_class_position)


def _unwrap(own_names: Iterable[str]) -> dict[str, str]:
    """Names without what wraps a whole model, or what torch.compile puts between -> the file's own."""
    names = {}
    for own_name in own_names:
        name = logical_name(own_name)
        if name in names:
            name = own_name
        names[name] = own_name
    while True:
        wrapper = next((each for each in _WRAPPERS if names and all(name.startswith(each) for name in names)), None)
        if wrapper is None:
            return names
        names = {name.removeprefix(wrapper): own_name for name, own_name in names.items()}
