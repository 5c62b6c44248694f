"""A folder for each split with a folder for each class, as torchvision's ImageFolder reads it."""

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

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
) -> Task:
    """Images in folders that are called as their classes are.

    Args:
        root: the folder that has a folder for each split.
        train, val: these folders' names.
        transform, image_size, num_workers, skip_bad_samples, in_memory, on_device: as of ``picture_task``.

    Raises:
        UserError: an unknown transform; a folder is missing or has no images; ``val`` has a class that ``train`` lacks.
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

    Args:
        root: the folder that has a folder for each split.
        split: the name of this one's.
        classes: in the order of their numbers.

    Raises:
        UserError: it is missing, has no images, or has a class that is not among ``classes``.
    """
    folder = root / split
    unknown = sorted(set(folder_classes(root, split)) - set(classes))
    if unknown:
        raise UserError(f"{folder / unknown[0]}: {len(unknown)} of the classes here are none that training images have")
    numbers = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise UserError(f"{folder}: has no images ({', '.join(IMG_EXTENSIONS)})")
    return ImageList(
        root=root,
        files=[Path(path).relative_to(root).as_posix() for path, _ in samples],
        labels=[label for _, label in samples],
        classes=classes,
        name=str(folder),
    )
