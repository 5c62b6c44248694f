"""A folder for each split with a folder for each class, as torchvision's ImageFolder reads it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, is_image_file

from spt_dist.data.image_set import ImageList
from spt_dist.data.lists.picture_task import picture_task
from spt_dist.data.task import Task
from spt_dist.errors import UserError


def build_image_folder(
    root: str,
    train: str = "train",
    val: str = "val",
    transform: str = "vtab",
    image_size: int = 224,
    num_workers: int = 4,
    skip_bad_samples: bool = False,
    in_memory: bool | None = None,
    on_device: bool = False,
    normalize: str | dict[str, Any] | None = None,
) -> Task:
    """Images in folders that are called as their classes are.

    Args:
        root: the folder that has a folder for each split.
        train, val: these folders' names.
        transform, image_size, num_workers, skip_bad_samples, in_memory, on_device, normalize: as of
            ``picture_task``.

    Raises:
        UserError: an unknown transform; a folder is missing, has no images, or is reached twice; ``val`` has a class
            that ``train`` lacks.
    """
    # What is held out may lack a class, but the numbers are those of training.
    classes = folder_classes(Path(root), train)
    return picture_task(
        read_image_folder(Path(root), train, classes),
        read_image_folder(Path(root), val, classes),
        transform=transform,
        image_size=image_size,
        num_workers=num_workers,
        skip_bad_samples=skip_bad_samples,
        in_memory=in_memory,
        on_device=on_device,
        normalize=normalize,
    )


def folder_classes(root: Path, split: str) -> tuple[str, ...]:
    """The classes of a split: its folders, sorted.

    Raises:
        UserError: it is missing, or has no folders.
    """
    try:
        names, _ = find_classes(root / split)
    except OSError as error:
        raise UserError(f"{root / split}: has to be a folder with a folder of images for each class") from error
    return tuple(names)


def read_image_folder(root: Path, split: str, classes: tuple[str, ...]) -> ImageList:
    """List the images of a split, in folders of a class as well; files that are not called as images are, are not.

    Links are followed, as torchvision does, but none may lead where the split's images are read anyway.

    Args:
        root: the folder that has a folder for each split.
        split: the name of this one's.
        classes: in the order of their numbers.

    Raises:
        UserError: it is missing, has no images, has a class that is not among ``classes``, or has a link by which a
            folder is reached twice.
    """
    folder = root / split
    found = folder_classes(root, split)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise UserError(f"{folder / unknown[0]}: {len(unknown)} of the classes here are none that training images have")
    numbers = {name: label for label, name in enumerate(classes)}
    files, labels = [], []
    reached = _Reached(folder)
    for name in found:
        # Sorted by path, as torchvision does: "a", "a-b", "a/b" is not the order in which they are walked.
        for inside, images in sorted(_walk(root, folder / name, reached)):
            files += [f"{inside}/{image}" for image in sorted(images)]
            labels += [numbers[name]] * len(images)
    if not files:
        raise UserError(f"{folder}: has no images ({', '.join(IMG_EXTENSIONS)})")
    return ImageList(root=root, files=files, labels=labels, classes=classes, name=str(folder))


def _walk(root: Path, folder: Path, reached: "_Reached") -> Iterator[tuple[str, list[str]]]:
    """Each folder of a class, relative to ``root`` and with "/", and the names of its images.

    Args:
        root: the folder that has a folder for each split.
        folder: the folder of the class.
        reached: the split's folders so far; gets these.

    Raises:
        UserError: a folder is reached twice.
    """
    for path, folders, names in os.walk(folder, followlinks=True):
        # All ranks name the same link.
        folders.sort()
        reached.add(Path(path))
        yield Path(path).relative_to(root).as_posix(), [name for name in names if is_image_file(name)]


class _Reached:
    """The folders of a split that a walk has come to.

    Args:
        split: the split's own.
    """

    def __init__(self, split: Path) -> None:
        self._split = split
        # Where a folder really is -> the path that led there.
        self._paths = {os.path.realpath(split): split}

    def add(self, path: Path) -> None:
        """Add a folder, which may be or lie behind a link.

        Raises:
            UserError: it has been reached by another path, or is one of those that it lies in.
        """
        place = os.path.realpath(path)
        # Told at once: a link to "/" leads back after all of the disk.
        if Path(os.path.realpath(path.parent)).is_relative_to(place):
            raise UserError(f"{path}: this link leads to {place}, in which it lies itself; remove it")
        first = self._paths.setdefault(place, path)
        if first == path:
            return
        # Not always the second is behind a link: "a/link" comes before the "b" that it leads to.
        link, other = self._link(path), first
        if link is None:
            link, other = self._link(first), path
        raise UserError(f"{link}: this link leads to {place}, whose images are read through {other} too; remove it")

    def _link(self, path: Path) -> Path | None:
        """The innermost link of a path, of those in the split."""
        depth = len(path.relative_to(self._split).parts)
        return next((folder for folder in [path, *path.parents][:depth] if folder.is_symlink()), None)
