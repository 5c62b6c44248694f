"""Images with masks, in shards, as a set of samples.

mmseg's transforms read files by their paths. What comes out of a shard gets one for as long as it is looked at, in
memory.

Shape suffixes: B samples, C channels (red, green, blue), H rows, W columns.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spt_dist.data.masked_images import Info, MaskedImages
from spt_dist.data.samples import BadSampleError, Item, RawSample
from spt_dist.data.shards.index import ShardIndex
from spt_dist.data.shards.shard_set import ShardSet


class SegmentationShards(ShardSet):
    """Images with masks: crops to train on, and whole images, ``views``, to be evaluated.

    Args:
        location, index, split, skip_bad, num_workers, lanes, window: as of ``ShardSet``.
        images: what is made of them.
    """

    def __init__(
        self,
        location: str,
        index: ShardIndex,
        split: str,
        images: MaskedImages,
        *,
        lanes: int,
        window: int,
        skip_bad: bool,
        num_workers: int,
    ) -> None:
        self._make: Callable[[StoredImages], ShardSet] = partial(
            ShardSet, location, index, split, lanes=lanes, window=window, skip_bad=skip_bad, num_workers=num_workers
        )
        crops = StoredImages(images, images.crop)
        super().__init__(
            location, index, split, crops, lanes=lanes, window=window, skip_bad=skip_bad, num_workers=num_workers
        )
        self._split, self._images = split, images
        self.contents = index.split(split, location).digest()
        self.classes, self.palette = images.classes, images.palette

    def label(self, index: int) -> str:
        """What pictures of a sample are called."""
        return f"{self._split}_{index:08d}"

    def views(self, scales: Sequence[float]) -> ShardSet:
        """The whole images; an item is ``MaskedImages.whole``."""
        resizes = self._images.resizes(scales)
        return self._make(StoredImages(self._images, partial(_whole, self._images, resizes)))

    def picture(self, index: int) -> npt.NDArray[np.uint8]:
        """The image as it is stored: RGB uint8 ``(H, W, 3)``."""
        pictures = self._make(StoredImages(self._images, partial(_picture, self._images)))
        found = next(iter(pictures.stream(None, [index])))
        if isinstance(found, BadSampleError):
            raise found
        picture: Any = found[0]
        return picture


class StoredImages:
    """What a stored image and its mask become: a ``Preparation``.

    Args:
        images: for blank ones.
        make: what mmseg's transforms begin with, epoch and index to an item.
    """

    def __init__(self, images: MaskedImages, make: Callable[[Info, int | None, int], Any]) -> None:
        self._images, self._make = images, make

    def prepare(self, sample: RawSample, epoch: int | None, index: int) -> Item:
        """See ``Preparation``."""
        assert isinstance(sample.target, bytes), "segmentation has masks"
        with file_in_memory(sample.image) as image, file_in_memory(sample.target) as mask:
            info: Info = {"img_path": image, "seg_map_path": mask, "seg_fields": []}
            # As mmseg's ADE20KDataset means its labels.
            info |= {"label_map": None, "reduce_zero_label": True}
            try:
                item: Item = self._make(info, epoch, index)
            except BadSampleError as error:
                named = str(error).replace(image, f"{sample.name}, image").replace(mask, f"{sample.name}, mask")
                raise BadSampleError(named) from error
        return item

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """Images ``(B, 3, H, W)``."""
        return torch.stack(list(inputs))

    def blank(self) -> Item:
        """As ``MaskedImages.blank``."""
        return self._images.blank()


def _whole(images: MaskedImages, resizes: Sequence[Any], info: Info, epoch: int | None, index: int) -> Any:
    return images.whole(info, resizes)


def _picture(images: MaskedImages, info: Info, epoch: int | None, index: int) -> Any:
    return images.picture(info), None


@contextmanager
def file_in_memory(content: bytes) -> Iterator[str]:
    """The path of a file with this content, which lies in memory and is gone after the block."""
    descriptor = os.memfd_create("sample")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
