"""What a task is to the rest of the package."""

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset


@dataclass(frozen=True)
class Task:
    """Training and held-out samples; an item of either is ``(image, label)``, image fp32 ``(C, H, W)``, normalised."""

    train: Dataset[Any]
    val: Dataset[Any]
    num_train: int
    num_val: int
    num_classes: int
