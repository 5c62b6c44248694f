"""The tasks of the mini-benchmark, and how a config names one."""

from pathlib import Path
from typing import Final

from spt_dist.config import lookup
from spt_dist.data.lists.picture_task import picture_task
from spt_dist.data.lists.vtab import NATURAL, SPECIALIZED, STRUCTURED, VtabTask, read_vtab_list
from spt_dist.data.mini.canvas import IMAGE_SIZE
from spt_dist.data.task import Task

MINI_TASKS: Final[dict[str, VtabTask]] = {
    "digits": VtabTask(10, NATURAL, "Digits"),
    "photos": VtabTask(12, NATURAL, "Photos"),
    "textures": VtabTask(12, SPECIALIZED, "Textures"),
    "grades": VtabTask(5, SPECIALIZED, "Grades"),
    "solids_count": VtabTask(8, STRUCTURED, "Solids-Count"),
    "solids_dist": VtabTask(6, STRUCTURED, "Solids-Dist"),
    "sprites_loc": VtabTask(16, STRUCTURED, "Sprites-Loc"),
    "sprites_ori": VtabTask(16, STRUCTURED, "Sprites-Ori"),
}


def build_mini(
    root: str,
    task: str,
    train: str = "train800val200",
    val: str = "test",
    transform: str = "vtab_inception",
    image_size: int = IMAGE_SIZE,
    num_workers: int = 0,
    skip_bad_samples: bool = False,
    in_memory: bool | None = None,
    on_device: bool = False,
) -> Task:
    """A task of the mini-benchmark.

    Args:
        root: the folder that ``make_mini`` made.
        task: one of ``MINI_TASKS``.
        train, val: lists, as of ``build_vtab``.
        transform, image_size, num_workers, skip_bad_samples, in_memory, on_device: as of ``picture_task``.

    Raises:
        UserError: as of ``build_vtab``.
    """
    num_classes = lookup("data.task", task, MINI_TASKS).num_classes
    return picture_task(
        read_vtab_list(Path(root) / task, train, num_classes),
        read_vtab_list(Path(root) / task, val, num_classes),
        transform=transform,
        image_size=image_size,
        num_workers=num_workers,
        skip_bad_samples=skip_bad_samples,
        in_memory=in_memory,
        on_device=on_device,
    )
