"""Representation layers before a head (ImageNet-21k's ViTs), which timm's models have not.

A head after such a layer is left with it: without it, it means nothing.
"""

from collections.abc import Mapping

from spt_dist.models.formats.source import Draft, Shape


def leave_pre_logits(draft: Draft, wanted: Mapping[str, Shape], prefix: str, separator: str) -> None:
    """Leave the layer and the head, unless the model has all of the layer under the file's names.

    Args:
        draft: of any file; one without such a layer stays as it is.
        wanted: names and shapes of the model's tensors.
        prefix: before the names of the file's tower.
        separator: between the names of a module and of its tensors.
    """
    layer = [name for name in draft.shapes if name.startswith(f"{prefix}pre_logits{separator}")]
    if all(name in wanted for name in layer):
        return
    for name in layer:
        draft.leave(name, "representation layer, which timm's models have not")
    for name in draft.shapes:
        if name.startswith(f"{prefix}head{separator}"):
            draft.leave(name, "reads the representation layer, which is left out")
