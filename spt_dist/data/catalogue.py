"""The data sets that are given by lists, as those who check or convert them see them: all of their splits at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Final

from spt_dist.config import lookup
from spt_dist.data.image_set import ImageList
from spt_dist.data.lists import fgvc, vtab
from spt_dist.data.lists.fgvc import FGVC_SETS, read_fgvc_list
from spt_dist.data.lists.image_folder import folder_classes, read_image_folder
from spt_dist.data.lists.vtab import VTAB_TASKS, read_vtab_list
from spt_dist.errors import UserError


@dataclass(frozen=True)
class Published:
    """How many samples some splits have together."""

    splits: tuple[str, ...]
    num_samples: int


@dataclass(frozen=True)
class Listed:
    """A data set that is given by lists.

    Attributes:
        name: what it is called, for people.
        read: split -> reads its list; raises a ``UserError`` where that is not what it should be.
        disjoint: pairs of splits that have no image in common.
        published: what is known of the sizes of a complete copy.
        compare_contents: whether two images are the same if their files' contents are, or else if their names are.
            Not for published lists: some sets have equal pictures under several names, such as dSprites.
    """

    name: str
    read: Mapping[str, Callable[[], ImageList]]
    disjoint: Sequence[tuple[str, str]]
    published: Sequence[Published] = ()
    compare_contents: bool = False

    def read_all(self) -> dict[str, ImageList]:
        """The lists of all splits.

        Raises:
            UserError: one is not what it should be.
        """
        return {split: read() for split, read in self.read.items()}


# Of test images: what the tests of VTAB's own code expect (google-research/task_adaptation, data/*_test.py).
_VTAB_TEST: Final = {
    "cifar": 10_000,
    "caltech101": 6_084,
    "dtd": 1_880,
    "oxford_flowers102": 6_149,
    "oxford_iiit_pet": 3_669,
    "svhn": 26_032,
    "sun397": 21_750,
    "patch_camelyon": 32_768,
    "eurosat": 5_400,
    "resisc45": 6_300,
    "diabetic_retinopathy": 42_670,
    "clevr_count": 15_000,
    "clevr_dist": 15_000,
    "dmlab": 22_735,
    "kitti": 711,
    "dsprites_loc": 73_728,
    "dsprites_ori": 73_728,
    "smallnorb_azi": 12_150,
    "smallnorb_ele": 12_150,
}

_ONE_OF_THREE: Final = (("train", "val"), ("train", "test"), ("val", "test"))

# CUB, Cars and Flowers: from the same tests. Dogs: its entry in the catalogue of TensorFlow Datasets. Flowers comes
# with a val of its own; of the others VPT cut it from train, so the sum is compared. NABirds: no source, no number.
_FGVC_PUBLISHED: Final = {
    "cub": (Published(("train", "val"), 5_994), Published(("test",), 5_794)),
    "cars": (Published(("train", "val"), 8_144), Published(("test",), 8_041)),
    "dogs": (Published(("train", "val"), 12_000), Published(("test",), 8_580)),
    "flowers": (Published(("train",), 1_020), Published(("val",), 1_020), Published(("test",), 6_149)),
}


def vtab_task(root: Path, task: str) -> Listed:
    """A task of VTAB-1k.

    Args:
        root: the folder that has a folder for each task.
        task: one of ``VTAB_TASKS``.

    Raises:
        UserError: an unknown task.
    """
    known = lookup("--task", task, VTAB_TASKS)
    return Listed(
        name=f"{root / task}: {known.label}",
        read={split: partial(read_vtab_list, root / task, split, known.num_classes) for split in vtab.SPLITS},
        # train800val200 is meant to be the sum of the other two.
        disjoint=(("train800", "val200"), ("train800", "test"), ("val200", "test"), ("train800val200", "test")),
        published=(
            Published(("train800",), 800),
            Published(("val200",), 200),
            Published(("train800val200",), 1_000),
            Published(("test",), _VTAB_TEST[task]),
        ),
    )


def vtab_tasks(root: Path) -> list[str]:
    """The tasks of VTAB-1k that a folder has.

    Raises:
        UserError: it has none.
    """
    return _folders(root, VTAB_TASKS)


def fgvc_set(root: Path, data_set: str) -> Listed:
    """One of the fine-grained data sets.

    Args:
        root: the folder that has a folder for each data set.
        data_set: one of ``FGVC_SETS``.

    Raises:
        UserError: an unknown data set.
    """
    known = lookup("--data-set", data_set, FGVC_SETS)
    return Listed(
        name=f"{root / data_set}: {known.label}",
        read={split: partial(read_fgvc_list, root / data_set, split, known) for split in fgvc.SPLITS},
        disjoint=_ONE_OF_THREE,
        published=_FGVC_PUBLISHED.get(data_set, ()),
    )


def fgvc_sets(root: Path) -> list[str]:
    """The fine-grained data sets that a folder has.

    Raises:
        UserError: it has none.
    """
    return _folders(root, FGVC_SETS)


def image_folder(root: Path) -> Listed:
    """A folder with the folders train, val and, if there is one, test, each with a folder for each class.

    Raises:
        UserError: there is no train, or it has no folders.
    """
    classes = folder_classes(root, "train")
    splits = ["train", "val"] + ["test"] * (root / "test").is_dir()
    return Listed(
        name=str(root),
        read={split: partial(read_image_folder, root, split, classes) for split in splits},
        disjoint=tuple(combinations(splits, 2)),
        # Names begin with the split's, so they always differ.
        compare_contents=True,
    )


def _folders(root: Path, known: Mapping[str, object]) -> list[str]:
    found = [name for name in known if (root / name).is_dir()]
    if not found:
        raise UserError(f"{root}: has none of the folders {', '.join(known)}")
    return found
