"""What lists of labelled images have, and what is wrong with them.

Shape suffixes: K classes.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import numpy as np
import numpy.typing as npt

from spt_dist.data.catalogue import Listed
from spt_dist.data.image_set import ImageList
from spt_dist.data.pictures import decode
from spt_dist.data.samples import BadSampleError
from spt_dist.errors import UserError
from spt_dist.progress import progress_bar
from spt_dist.tables import format_table

MOST_CLASSES_SHOWN: Final = 50
NUM_NAMED: Final = 3


@dataclass(frozen=True)
class SplitReport:
    """What one split has.

    Attributes:
        name: of the split.
        counts_K: samples of each class, be their images good or bad; ``None`` if the list is not what it should be.
        classes: names of the classes.
        problems: what is wrong, a line each.
    """

    name: str
    counts_K: npt.NDArray[np.int64] | None
    classes: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """Be they good or bad."""
        return 0 if self.counts_K is None else int(self.counts_K.sum())


@dataclass(frozen=True)
class Report:
    """What a data set has.

    Attributes:
        listed: the data set.
        splits: a report on each.
        overlaps: what is wrong between splits, a line for each pair.
    """

    listed: Listed
    splits: tuple[SplitReport, ...]
    overlaps: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """All that is wrong."""
        return [problem for split in self.splits for problem in split.problems] + list(self.overlaps)


def check_lists(listed: Listed, num_threads: int, show_progress: bool = True) -> Report:
    """Read the lists of a data set, and every file that they name.

    Args:
        listed: the data set.
        num_threads: how many files are read at a time.
        show_progress: whether to show bars.
    """
    lists: dict[str, ImageList] = {}
    images: dict[str, dict[str, str]] = {}
    splits = []
    for name, read in listed.read.items():
        try:
            lists[name] = read()
        except UserError as error:
            splits.append(SplitReport(name, None, (), (str(error),)))
            continue
        report, digests = _check_split(name, lists[name], num_threads, show_progress)
        splits.append(report)
        images[name] = digests if listed.compare_contents else {file: file for file in lists[name].files}
    overlaps = [
        f"{lists[first].root}: {overlap}"
        for first, second in listed.disjoint
        if first in images and second in images and (overlap := _overlap(first, images[first], second, images[second]))
    ]
    return Report(listed, tuple(splits), tuple(overlaps))


def summarise(report: Report) -> str:
    """Tables of what there is, and notes on what is not as it was published."""
    splits = [(split, split.counts_K) for split in report.splits if split.counts_K is not None]
    rows = {
        "samples": [f"{counts_K.sum():,}" for _, counts_K in splits],
        "classes": [f"{len(counts_K):,}" for _, counts_K in splits],
        "classes without samples": [f"{np.count_nonzero(counts_K == 0):,}" for _, counts_K in splits],
        "samples a class, fewest": [f"{counts_K.min():,}" for _, counts_K in splits],
        "samples a class, mean": [f"{counts_K.mean():,.1f}" for _, counts_K in splits],
        "samples a class, most": [f"{counts_K.max():,}" for _, counts_K in splits],
        "problems": [f"{len(split.problems):,}" for split, _ in splits],
    }
    columns = [split.name for split, _ in splits]
    parts = []
    if splits:
        parts.append(format_table(report.listed.name, ["", *columns], [[name, *cells] for name, cells in rows.items()]))
        parts.append(_class_table(splits, columns))
    counts = {split.name: split.num_samples for split, _ in splits}
    for published in report.listed.published:
        if all(name in counts for name in published.splits):
            found = sum(counts[name] for name in published.splits)
            if found != published.num_samples:
                names = " and ".join(published.splits)
                parts.append(f"note: {found:,} samples in {names}; as published there are {published.num_samples:,}")
    return "\n".join(parts)


def _class_table(splits: Sequence[tuple[SplitReport, npt.NDArray[np.int64]]], columns: Sequence[str]) -> str:
    classes = splits[0][0].classes
    total_K = np.sum([counts_K for _, counts_K in splits], axis=0)
    # The rarest first: they are what a list that is cut off lacks.
    shown = np.argsort(total_K, kind="stable")[:MOST_CLASSES_SHOWN]
    title = "samples of each class" if len(shown) == len(classes) else f"samples of the {len(shown)} rarest classes"
    names = [name if name == str(k) else f"{k} {name}" for k, name in enumerate(classes)]
    rows = [[names[k], *(f"{counts_K[k]:,}" for _, counts_K in splits)] for k in sorted(shown)]
    return format_table(title, ["", *columns], rows)


def _check_split(
    name: str, images: ImageList, num_threads: int, show_progress: bool
) -> tuple[SplitReport, dict[str, str]]:
    """What a split has, and the digest of the content of each file that is good."""
    problems, digests = [], {}
    with progress_bar(f"reading {name} files", len(images), show_progress) as bar:
        for file, (digest, problem) in zip(images.files, _examine_all(images, num_threads), strict=True):
            if problem is None:
                digests[file] = digest
            else:
                problems.append(problem)
            bar.advance()
    counts_K = np.bincount(images.labels, minlength=len(images.classes))
    return SplitReport(name, counts_K, tuple(images.classes), tuple(problems)), digests


def _examine_all(images: ImageList, num_threads: int) -> Iterator[tuple[str, str | None]]:
    """The digest of each file, and what is wrong with it, in order."""

    def examine(index: int) -> tuple[str, str | None]:
        try:
            sample = images.sample(index)
            decode(sample.image, sample.name)
        except BadSampleError as error:
            return "", str(error)
        return sha256(sample.image).hexdigest(), None

    pool = ThreadPoolExecutor(num_threads)
    try:
        yield from pool.map(examine, range(len(images)))
    finally:
        # Whoever stops half-way does not wait for the rest.
        pool.shutdown(cancel_futures=True)


def _overlap(first: str, first_images: dict[str, str], second: str, second_images: dict[str, str]) -> str | None:
    """What two splits have in common; of each split file -> what equal images have in common."""
    files = {image: file for file, image in reversed(second_images.items())}
    common = sorted(file for file, image in first_images.items() if image in files)
    if not common:
        return None
    pairs = [(file, files[first_images[file]]) for file in common[:NUM_NAMED]]
    named = [file if file == other else f"{file} is {other}" for file, other in pairs]
    more = ", ..." if len(common) > NUM_NAMED else ""
    return f"{len(common):,} images are in {first} and in {second}: {', '.join(named)}{more}"
