"""What a task is to the rest of the package."""

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

CLASSIFICATION, SEGMENTATION = "classification", "segmentation"


@dataclass(frozen=True)
class Task:
    """Training and held-out samples.

    Attributes:
        train, val: of a classification task items are ``(image, label)``, image fp32 ``(C, H, W)``, normalised; of a
            segmentation task these are ``SegmentationSet``.
        num_train, num_val: how many samples each has.
        num_classes: outputs of the head.
        kind: "classification" or "segmentation".
        num_workers: processes that read samples for one rank; 0 for the rank's own.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    num_train: int
    num_val: int
    num_classes: int
    kind: str = CLASSIFICATION
    num_workers: int = 0

    def train_at(self, epoch: int, seed: int) -> Dataset[Any]:
        """Training samples ``(image, target)`` as an epoch of a run with ``seed`` has them, augmented if they are."""
        at_epoch = getattr(self.train, "at_epoch", None)
        return self.train if at_epoch is None else at_epoch(seed * 1_000_003 + epoch)
