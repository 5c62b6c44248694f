"""ADE20K's folders, files and values: what those who read it and those who write it have to agree on."""

from dataclasses import dataclass
from typing import Final

OTHER: Final = 0
"""The mask's value where a pixel belongs to none of the classes; class ``k`` (from 0) has the value ``k + 1``."""

NUM_CLASSES: Final = 150


@dataclass(frozen=True)
class Split:
    """One half of the data set.

    Attributes:
        images, masks: folders, relative to the root; a mask is named as its image.
        prefix: what the names of its files begin with.
        num_images: how many the released data set has.
    """

    images: str
    masks: str
    prefix: str
    num_images: int


SPLITS: Final = {
    "training": Split("images/training", "annotations/training", "ADE_train", 20_210),
    "validation": Split("images/validation", "annotations/validation", "ADE_val", 2_000),
}
