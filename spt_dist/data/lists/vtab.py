"""VTAB-1k (Zhai et al. 2019) in the layout that NOAH's get_vtab1k.py writes and SPT, SSF and others read.

A task is a folder with the lists ``train800.txt``, ``val200.txt``, ``train800val200.txt`` and ``test.txt``. Each line
is a path in that folder, a blank and a class from 0: ``images/train800/000000.jpg 42``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spt_dist.config import lookup
from spt_dist.data.image_set import ImageList
from spt_dist.data.lists.listed import Listed, read_text, require_sound
from spt_dist.data.lists.picture_task import picture_task
from spt_dist.data.task import Task
from spt_dist.errors import UserError

SPLITS: Final = ("train800", "val200", "train800val200", "test")
NATURAL, SPECIALIZED, STRUCTURED = "natural", "specialized", "structured"


@dataclass(frozen=True)
class VtabTask:
    """One task of a benchmark in this layout.

    Attributes:
        num_classes: outputs of the head.
        group: "natural", "specialized" or "structured".
        label: its name in tables.
    """

    num_classes: int
    group: str
    label: str


# In the order of the papers' tables; numbers of classes as in ziplab/SPT, lib/datasets.py.
VTAB_TASKS: Final[dict[str, VtabTask]] = {
    "cifar": VtabTask(100, NATURAL, "CIFAR-100"),
    "caltech101": VtabTask(102, NATURAL, "Caltech101"),
    "dtd": VtabTask(47, NATURAL, "DTD"),
    "oxford_flowers102": VtabTask(102, NATURAL, "Flowers102"),
    "oxford_iiit_pet": VtabTask(37, NATURAL, "Pets"),
    "svhn": VtabTask(10, NATURAL, "SVHN"),
    "sun397": VtabTask(397, NATURAL, "Sun397"),
    "patch_camelyon": VtabTask(2, SPECIALIZED, "Camelyon"),
    "eurosat": VtabTask(10, SPECIALIZED, "EuroSAT"),
    "resisc45": VtabTask(45, SPECIALIZED, "Resisc45"),
    "diabetic_retinopathy": VtabTask(5, SPECIALIZED, "Retinopathy"),
    "clevr_count": VtabTask(8, STRUCTURED, "Clevr-Count"),
    "clevr_dist": VtabTask(6, STRUCTURED, "Clevr-Dist"),
    "dmlab": VtabTask(6, STRUCTURED, "DMLab"),
    "kitti": VtabTask(4, STRUCTURED, "KITTI-Dist"),
    "dsprites_loc": VtabTask(16, STRUCTURED, "dSpr-Loc"),
    "dsprites_ori": VtabTask(16, STRUCTURED, "dSpr-Ori"),
    "smallnorb_azi": VtabTask(18, STRUCTURED, "sNORB-Azim"),
    "smallnorb_ele": VtabTask(9, STRUCTURED, "sNORB-Ele"),
}


def build_vtab(
    root: str,
    task: str,
    train: str = "train800val200",
    val: str = "test",
    transform: str = "vtab",
    image_size: int = 224,
    num_workers: int = 4,
    skip_bad_samples: bool = False,
    in_memory: bool | None = None,
    on_device: bool = False,
    normalize: str | dict[str, Any] | None = None,
) -> Task:
    """A task of VTAB-1k.

    Args:
        root: the folder that has a folder for each task.
        task: one of ``VTAB_TASKS``.
        train, val: lists of images that train, and of those held out: "train800" and "val200" where something is to be
            chosen without looking at the test images.
        transform, image_size, num_workers, skip_bad_samples, in_memory, on_device, normalize: as of
            ``picture_task``.

    Raises:
        UserError: an unknown task, list or transform; a list or an image is missing; a list is not what it should be.
    """
    num_classes = lookup("data.task", task, VTAB_TASKS).num_classes
    return picture_task(
        read_vtab_list(Path(root) / task, train, num_classes),
        read_vtab_list(Path(root) / task, val, num_classes),
        transform=transform,
        image_size=image_size,
        num_workers=num_workers,
        skip_bad_samples=skip_bad_samples,
        in_memory=in_memory,
        on_device=on_device,
        normalize=normalize,
    )


def read_vtab_list(folder: Path, split: str, num_classes: int) -> ImageList:
    """Read one of a task's lists, and see that its images are there.

    Args:
        folder: of the task.
        split: one of ``SPLITS``.
        num_classes: classes are 0 to one less.

    Raises:
        UserError: it is missing or empty, has a line that is none, or names a file that is missing, comes twice or lies
            outside of ``folder``.
    """
    lookup("list of a VTAB task", split, dict.fromkeys(SPLITS))
    path = folder / f"{split}.txt"
    lines = enumerate(read_text(path).splitlines(), start=1)
    listed = [_parse(f"{path}:{number}", line, num_classes) for number, line in lines if line.strip()]
    require_sound(folder, listed, str(path))
    return ImageList(
        root=folder,
        files=[entry.file for entry in listed],
        labels=[entry.label for entry in listed],
        classes=tuple(str(label) for label in range(num_classes)),
        name=str(path),
    )


def _parse(where: str, line: str, num_classes: int) -> Listed:
    file, _, label = line.strip().rpartition(" ")
    # int() takes "1_0", "+1" and digits of other scripts as well.
    if not file or not (label.isascii() and label.isdigit()):
        raise UserError(f"{where}: {line!r} has to be a path, a blank and a class")
    if int(label) >= num_classes:
        raise UserError(f"{where}: class {label} of {file!r} has to lie between 0 and {num_classes - 1}")
    return Listed(where, file.rstrip(), int(label))
