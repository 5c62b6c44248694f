"""The mini-benchmark as files, in the layout of VTAB-1k."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from spt_dist.config import lookup
from spt_dist.data.mini import digits, photos, solids, sprites, textures
from spt_dist.data.mini.canvas import Draw
from spt_dist.data.mini.tasks import MINI_TASKS
from spt_dist.errors import UserError
from spt_dist.progress import Bar, progress_bar

DRAWERS: Final[dict[str, Callable[[], Draw]]] = {
    "digits": digits.digits_task,
    "photos": photos.photos_task,
    "textures": textures.textures_task,
    "grades": textures.grades_task,
    "solids_count": solids.count_task,
    "solids_dist": solids.distance_task,
    "sprites_loc": sprites.location_task,
    "sprites_ori": sprites.orientation_task,
}
"""Task -> loads what it needs and returns the function that draws its pictures."""

STAMP: Final = "mini.json"
"""In each task's folder: what it was made from."""
LISTS: Final = {"train": "train800", "val": "val200", "test": "test"}
NUM_TRAIN, NUM_VAL = 800, 200
# Of pictures and labels: to be raised where a change of the drawing makes others of the same seed.
_VERSION: Final = 1


def make_mini(
    root: str | Path,
    seed: int = 0,
    tasks: Sequence[str] = tuple(MINI_TASKS),
    num_test: int = 1000,
    show_progress: bool = True,
) -> Path:
    """Draw tasks of the mini-benchmark and write them as VTAB-1k keeps its own.

    ``root/TASK`` has the lists train800, val200, train800val200 and test, and below ``images`` PNG files of 32 x 32
    pixels. It appears when its last file is written; one that is there already, made alike, is left as it is.

    Args:
        root: the folder; it is made where it is missing.
        seed: other seeds draw other pictures. Which digits and parts of photographs are for testing never changes.
        tasks: of ``MINI_TASKS``.
        num_test: test pictures a task; "digits" has 797 at most.
        show_progress: whether to show a bar.

    Returns:
        ``root``.

    Raises:
        UserError: an unknown task; a number is too small; a task's folder is there, but was made otherwise;
            scikit-learn or scikit-image is missing.
        OSError: of the file system.
    """
    for task in tasks:
        lookup("task", task, MINI_TASKS)
    if seed < 0:
        raise UserError(f"--seed {seed}: has to be 0 or more")
    if num_test < 1:
        raise UserError(f"--num-test {num_test}: has to be at least 1")
    root = Path(root).resolve()
    root.mkdir(parents=True, exist_ok=True)
    stamp = {"format": "spt_dist.mini", "version": _VERSION, "seed": seed, "num_test": num_test}
    missing = [task for task in dict.fromkeys(tasks) if not _is_made(root / task, stamp)]
    totals = {task: sum(_sizes(task, num_test).values()) for task in missing}
    with progress_bar("drawing the mini-benchmark", sum(totals.values()), show_progress) as bar:
        for task in missing:
            with tempfile.TemporaryDirectory(prefix=f".{task}.", dir=root) as temporary:
                made = Path(temporary, "made")
                _write_task(made, task, seed, _sizes(task, num_test), bar)
                (made / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
                made.rename(root / task)
    return root


def _sizes(task: str, num_test: int) -> dict[str, int]:
    most = digits.NUM_TEST if task == "digits" else num_test
    return {"train": NUM_TRAIN, "val": NUM_VAL, "test": min(num_test, most)}


def _is_made(folder: Path, stamp: dict[str, Any]) -> bool:
    """Whether a task is there as asked for; an error if something else is."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is there already, and make_mini didn't make it; give another folder") from error
    if found != stamp:
        raise UserError(
            f"{folder}: was made with {found}, not with {stamp}; remove it, or give another folder for these"
        )
    return True


def _write_task(folder: Path, task: str, seed: int, sizes: dict[str, int], bar: Bar) -> None:
    draw = DRAWERS[task]()
    lists: dict[str, list[str]] = {}
    for split_number, (split, size) in enumerate(sizes.items()):
        name = LISTS[split]
        (folder / "images" / name).mkdir(parents=True)
        lists[name] = []
        for number in range(size):
            # A generator for each picture: more of them are more, not others.
            rng = np.random.default_rng((seed, list(MINI_TASKS).index(task), split_number, number))
            image_HWC, label = draw(rng, split, number)
            file = f"images/{name}/{number:06d}.png"
            Image.fromarray(image_HWC).save(folder / file)
            lists[name].append(f"{file} {label}\n")
            bar.advance(note=task)
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
