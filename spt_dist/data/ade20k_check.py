"""What a copy of ADE20K has, and what is wrong with it.

Shape suffixes: K values of a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spt_dist.data.ade20k_files import SplitFiles, open_split
from spt_dist.data.ade20k_layout import NUM_CLASSES, OTHER, SPLITS
from spt_dist.data.pairs import examine_all
from spt_dist.progress import progress_bar
from spt_dist.tables import format_table

NUM_TOP_CLASSES = 10


@dataclass(frozen=True)
class SplitReport:
    """What one split has.

    Attributes:
        name: "training" or "validation".
        num_images, num_masks: files, be they good or bad.
        counts_K: pixels of each of the masks' values, over the good pairs.
        problems: what is wrong, a line for each pair or file.
        classes: names of the classes; class ``k`` has the value ``k + 1``.
    """

    name: str
    num_images: int
    num_masks: int
    counts_K: npt.NDArray[np.int64]
    problems: list[str]
    classes: tuple[str, ...]

    @property
    def shares_K(self) -> npt.NDArray[np.float64]:
        """Share of the pixels that have each value; all 0 where there are no pixels."""
        return self.counts_K / max(1, int(self.counts_K.sum()))


def check_ade20k(root: str | Path, num_threads: int, show_progress: bool = True) -> list[SplitReport]:
    """Read every file of ADE20K, or of a data set of the same layout.

    Args:
        root: the folder that has ``images`` and ``annotations``.
        num_threads: how many files are read at a time.
        show_progress: whether to show bars.

    Returns:
        a report on training and one on validation.

    Raises:
        UserError: a folder is missing or has no images.
    """
    # Both before any file is read: a folder that is missing is found at once.
    splits = [open_split(root, name) for name in SPLITS]
    return [_check_split(split, num_threads, show_progress) for split in splits]


def summarise(reports: Sequence[SplitReport]) -> str:
    """Tables of what there is, and notes on what is not as in the released data set."""
    rows = {
        "images": [f"{report.num_images:,}" for report in reports],
        "masks": [f"{report.num_masks:,}" for report in reports],
        "problems": [f"{len(report.problems):,}" for report in reports],
        "pixels in good masks": [f"{report.counts_K.sum():,}" for report in reports],
        'share of "other"': [f"{report.shares_K[OTHER]:.1%}" for report in reports],
        f"classes that occur, of {NUM_CLASSES}": [
            f"{np.count_nonzero(np.delete(report.counts_K, OTHER))}" for report in reports
        ],
    }
    columns = ["", *(report.name for report in reports)]
    total_K = np.sum([report.counts_K for report in reports], axis=0)
    largest = [value for value in np.argsort(-total_K, kind="stable") if value != OTHER and total_K[value]]
    top = [
        [f"{value} {reports[0].classes[value - 1].strip()}", *(f"{report.shares_K[value]:.1%}" for report in reports)]
        for value in largest[:NUM_TOP_CLASSES]
    ]
    parts = [format_table("files and labels", columns, [[name, *cells] for name, cells in rows.items()])]
    if top:
        parts.append(format_table("the most frequent classes, by share of the pixels", columns, top))
    parts += [
        f"note: {report.num_images:,} {report.name} images; the released ADE20K has {SPLITS[report.name].num_images:,}"
        for report in reports
        if report.num_images != SPLITS[report.name].num_images
    ]
    return "\n".join(parts)


def _check_split(split: SplitFiles, num_threads: int, show_progress: bool) -> SplitReport:
    counts_K = np.zeros(NUM_CLASSES + 1, dtype=np.int64)
    pairs = split.pairs()
    without_mask = set(split.lone_images)
    problems = [f"{image}: has no mask" for image in split.lone_images]
    problems += [f"{mask}: has no image" for mask in split.lone_masks]
    whole = [pair for pair in pairs if pair[0] not in without_mask]
    with progress_bar(f"reading {split.name} files", len(whole), show_progress) as bar:
        for examined in examine_all(whole, NUM_CLASSES, num_threads):
            if examined.counts_K is not None:
                counts_K += examined.counts_K
            if examined.problem is not None:
                problems.append(examined.problem)
            bar.advance()
    return SplitReport(
        name=split.name,
        num_images=len(pairs),
        num_masks=len(whole) + len(split.lone_masks),
        counts_K=counts_K,
        problems=problems,
        classes=tuple(split.samples.metainfo["classes"]),
    )
