"""Images with masks, in files, as a set of samples.

Shape suffixes: B samples, C channels (red, green, blue), H rows, W columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmseg.datasets import BaseSegDataset
from torch import Tensor
from torch.utils.data import Dataset

from spt_dist.data.masked_images import Info, MaskedImages
from spt_dist.data.pairs import Pair
from spt_dist.data.samples import Item, SampleSet


class SegmentationSet(SampleSet):
    """Images with masks: crops to train on, and whole images, ``views``, to be evaluated.

    Args:
        samples: mmseg's data set: where the files are.
        images: what is made of them.
        num_workers: processes of each rank that prepare samples; 0 for the rank's own.
    """

    def __init__(self, samples: BaseSegDataset, images: MaskedImages, num_workers: int = 0) -> None:
        self._samples, self._images, self.num_workers = samples, images, num_workers
        self.classes, self.palette = images.classes, images.palette

    def __len__(self) -> int:
        return len(self._samples)

    def paths(self, index: int) -> Pair:
        """Image file and mask file of a sample."""
        info = self._info(index)
        return info["img_path"], info["seg_map_path"]

    def label(self, index: int) -> str:
        """What pictures of a sample are called."""
        return self.paths(index)[0].rpartition("/")[2].rpartition(".")[0]

    def views(self, scales: Sequence[float]) -> "Views":
        """The whole images; an item is ``MaskedImages.whole``."""
        return Views(self, scales)

    def picture(self, index: int) -> npt.NDArray[np.uint8]:
        """The image as it is in the file: RGB uint8 ``(H, W, 3)``."""
        return self._images.picture(self._info(index))

    def item(self, epoch: int | None, index: int) -> Item:
        """As ``MaskedImages.crop``."""
        return self._images.crop(self._info(index), epoch, index)

    def whole(self, index: int, resizes: Sequence[Any]) -> tuple[list[Tensor], Tensor]:
        """As ``MaskedImages.whole``."""
        return self._images.whole(self._info(index), resizes)

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """Images ``(B, 3, H, W)``."""
        return torch.stack(list(inputs))

    def blank(self) -> Item:
        """As ``MaskedImages.blank``."""
        return self._images.blank()

    def resizes(self, scales: Sequence[float]) -> list[Any]:
        """As ``MaskedImages.resizes``."""
        return self._images.resizes(scales)

    def _info(self, index: int) -> Info:
        info: Info = self._samples.get_data_info(index)
        return info


class Views(Dataset[Any]):
    """Whole images at several scales."""

    def __init__(self, samples: SegmentationSet, scales: Sequence[float]) -> None:
        self._samples, self._resizes = samples, samples.resizes(scales)
        self.num_workers = samples.num_workers

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor]:
        return self._samples.whole(index, self._resizes)
