"""The five fine-grained data sets as VPT (KMnP/vpt) keeps them.

A data set is a folder with ``train.json``, ``val.json`` and ``test.json``, each of which maps the path of an image to
the class as its authors number or name it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spt_dist.config import lookup
from spt_dist.data.image_set import ImageList
from spt_dist.data.lists.listed import Listed, read_text, require_sound
from spt_dist.data.lists.picture_task import picture_task
from spt_dist.data.task import Task
from spt_dist.errors import UserError

SPLITS: Final = ("train", "val", "test")


@dataclass(frozen=True)
class FgvcSet:
    """One of the data sets.

    Attributes:
        num_classes: outputs of the head.
        images: the folder that the lists' paths are relative to, itself relative to the data set's.
        label: its name in tables.
    """

    num_classes: int
    images: str
    label: str


# In the order of the papers' tables; called as VPT's configs are. Folders as in src/data/datasets/json_dataset.py.
FGVC_SETS: Final[dict[str, FgvcSet]] = {
    "cub": FgvcSet(200, "images", "CUB-200-2011"),
    "nabirds": FgvcSet(555, "images", "NABirds"),
    "flowers": FgvcSet(102, ".", "Oxford Flowers"),
    "dogs": FgvcSet(120, "Images", "Stanford Dogs"),
    "cars": FgvcSet(196, ".", "Stanford Cars"),
}

_Annotations = dict[str, int | str]


def build_fgvc(
    root: str,
    data_set: str,
    train: str = "train",
    val: str = "test",
    transform: str = "fgvc",
    image_size: int = 224,
    num_workers: int = 4,
    skip_bad_samples: bool = False,
    in_memory: bool | None = None,
    on_device: bool = False,
    normalize: str | dict[str, Any] | None = None,
) -> Task:
    """One of the fine-grained data sets.

    Args:
        root: the folder that has a folder for each data set, called as in ``FGVC_SETS``.
        data_set: one of ``FGVC_SETS``.
        train, val: lists of images that train, and of those held out: "val" where something is to be chosen without
            looking at the test images.
        transform, image_size, num_workers, skip_bad_samples, in_memory, on_device, normalize: as of
            ``picture_task``.

    Raises:
        UserError: an unknown data set, list or transform; a list or an image is missing; a list is not what it should
            be; all lists together have another number of classes.
    """
    found = lookup("data.data_set", data_set, FGVC_SETS)
    return picture_task(
        read_fgvc_list(Path(root) / data_set, train, found),
        read_fgvc_list(Path(root) / data_set, val, found),
        transform=transform,
        image_size=image_size,
        num_workers=num_workers,
        skip_bad_samples=skip_bad_samples,
        in_memory=in_memory,
        on_device=on_device,
        normalize=normalize,
    )


def read_fgvc_list(folder: Path, split: str, data_set: FgvcSet) -> ImageList:
    """Read one of a data set's lists, and see that its images are there.

    Classes are numbered in the sorted order of what all three lists call them. VPT's code numbers those of each list by
    itself, which is the same as long as each list has every class, and wrong otherwise.

    Args:
        folder: of the data set.
        split: one of ``SPLITS``.
        data_set: what is expected there.

    Raises:
        UserError: a list is missing, or is no JSON object of paths and classes, or names a file that is missing, comes
            twice or lies outside of the folder; or there is another number of classes.
    """
    lookup("list of an FGVC data set", split, dict.fromkeys(SPLITS))
    annotations = {name: _read(folder / f"{name}.json") for name in SPLITS}
    classes = _classes(folder, annotations.values(), data_set.num_classes)
    number = {found: label for label, found in enumerate(classes)}
    path, root = folder / f"{split}.json", folder / data_set.images
    listed = [
        Listed(f"{path}: entry {place}", file, number[found])
        for place, (file, found) in enumerate(annotations[split].items(), start=1)
    ]
    require_sound(root, listed, str(path))
    return ImageList(
        root=root,
        files=[entry.file for entry in listed],
        labels=[entry.label for entry in listed],
        classes=tuple(str(found) for found in classes),
        name=str(path),
    )


def _read(path: Path) -> _Annotations:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Of two equal keys json would keep the second without a word.
        annotations = dict(pairs)
        if len(annotations) < len(pairs):
            file = next(file for place, (file, _) in enumerate(pairs) if file in dict(pairs[:place]))
            raise UserError(f"{path}: {file!r} is in the list twice")
        return annotations

    try:
        annotations = json.loads(read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is no JSON ({error})") from error
    if not isinstance(annotations, dict):
        raise UserError(f"{path}: has to be a JSON object from paths to classes, not {type(annotations).__name__}")
    for place, (file, found) in enumerate(annotations.items(), start=1):
        if type(found) not in (int, str):
            raise UserError(f"{path}: entry {place}: the class {found!r} of {file!r} has to be a number or a name")
    return annotations


def _classes(folder: Path, lists: Iterable[_Annotations], num_classes: int) -> list[int | str]:
    """All lists' classes, sorted."""
    classes = {found for annotations in lists for found in annotations.values()}
    if len({type(found) for found in classes}) > 1:
        raise UserError(f"{folder}: some lists have numbers as classes and some names; they have to be of one kind")
    if len(classes) != num_classes:
        raise UserError(f"{folder}: its lists have {len(classes):,} classes instead of {num_classes}")
    return sorted(classes)
