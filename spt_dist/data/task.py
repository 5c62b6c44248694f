"""What a task is to the rest of the package."""

from dataclasses import dataclass

from spt_dist.data.loader import AnySet
from spt_dist.normalisation import Normalisation

CLASSIFICATION, SEGMENTATION = "classification", "segmentation"


@dataclass(frozen=True)
class Task:
    """Training and held-out samples.

    Attributes:
        train, val: of a classification task batches are of images, fp32 ``(B, C, H, W)``, normalised, and labels, int64
            ``(B,)``; of a segmentation task these are ``SegmentationSet``.
        num_train, num_val: how many samples each has.
        num_classes: outputs of the head.
        kind: "classification" or "segmentation".
        normalisation: of images, where a config chooses it; ``None`` where the data have their own.
        contents: a digest of which training samples there are, in which order; "" where it follows from the config.
    """

    train: AnySet
    val: AnySet
    num_train: int
    num_val: int
    num_classes: int
    kind: str = CLASSIFICATION
    contents: str = ""
    normalisation: Normalisation | None = None
