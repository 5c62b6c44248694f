"""The loss that a model is trained and scored with, one value a sample."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.models.wrappers import unwrap

SampleLosses = Callable[[Any, Tensor], Tensor]


def sample_losses(model: nn.Module) -> SampleLosses:
    """Outputs and targets of ``model`` -> each sample's own loss, fp32 ``(B,)``.

    A model may have one of its own, ``per_image_losses`` (segmentation); others are classifiers.
    """
    own: SampleLosses | None = getattr(unwrap(model), "per_image_losses", None)
    return own or _cross_entropies


def targets_shape(model: nn.Module, images_shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Shape of the int64 targets for images ``(B, C, H, W)``: ``(B,)``, or ``(B, H, W)`` for segmentation."""
    is_dense = hasattr(unwrap(model), "per_image_losses")
    return (images_shape[0], *images_shape[2:]) if is_dense else images_shape[:1]


def _cross_entropies(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    return F.cross_entropy(logits_BK.float(), labels_B, reduction="none")
