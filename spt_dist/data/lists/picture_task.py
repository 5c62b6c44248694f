"""Two lists of images as a classification task."""

from collections.abc import Mapping
from typing import Any

from spt_dist.data.image_set import ImageList, ImageSet
from spt_dist.data.pictures import PicturePreparation
from spt_dist.data.task import Task


def picture_task(
    train: ImageList,
    val: ImageList,
    *,
    transform: str,
    image_size: int,
    num_workers: int,
    skip_bad_samples: bool,
    in_memory: bool | None,
    on_device: bool,
    normalize: str | Mapping[str, Any] | None = None,
) -> Task:
    """A task of ``ImageSet``.

    Args:
        train, val: images that train, and those held out; of the same classes.
        transform: one of ``transforms.TRANSFORMS``.
        image_size: edge of the square that the model takes, in pixels.
        num_workers, in_memory: as of ``ImageSet``.
        skip_bad_samples: leave out images that can't be decoded, with a count, instead of ending where one is met.
        on_device, normalize: as of ``PicturePreparation``.

    Raises:
        UserError: an argument is out of range.
    """
    assert train.classes == val.classes, "readers give both lists the same classes"
    preparation = PicturePreparation(transform, image_size, on_device, normalize)
    train_set, val_set = (
        ImageSet(images, preparation, in_memory=in_memory, skip_bad=skip_bad_samples, num_workers=num_workers)
        for images in (train, val)
    )
    return Task(train_set, val_set, len(train), len(val), len(train.classes), contents=train.digest())
