"""Labelled image files as a set of samples."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from torch import Tensor

from spt_dist.data.pictures import PicturePreparation
from spt_dist.data.samples import BadSampleError, Item, RawSample, SampleSet
from spt_dist.errors import UserError
from spt_dist.progress import progress_bar

_MOST_KEPT: Final = 2**30
_MOST_THREADS: Final = 8
_MOST_WITHOUT_BAR: Final = 1000


@dataclass(frozen=True)
class ImageList:
    """Which image files a split has.

    Attributes:
        root: the folder that ``files`` are relative to.
        files: their paths, with "/" between folders.
        labels: a class for each file, from 0.
        classes: their names.
        name: what lists them, for people: a file or a folder.
    """

    root: Path
    files: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """Of the files' names and classes, in their order."""
        listed = zip(self.files, self.labels, strict=True)
        return sha256(
            "\n".join(f"{label} {file}" for file, label in listed).encode(errors="surrogateescape")
        ).hexdigest()

    def sample(self, index: int) -> RawSample:
        """Read a file.

        Raises:
            BadSampleError: it can't be read.
        """
        path = self.root / self.files[index]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadSampleError(f"{path}: can't be read ({error.strerror})") from error
        return RawSample(str(path), content, self.labels[index])


class ImageSet(SampleSet):
    """Labelled image files.

    Args:
        images: the files.
        preparation: how they become inputs.
        in_memory: keep what is read, and read all of it, in threads, in ``warm_up`` or else with the first sample; no
            workers are started then. ``None``: do so where that takes no more than 1 GiB.
        skip_bad: leave out images that can't be decoded.
        num_workers: processes that read images, where these are not kept.

    Raises:
        UserError: images are to be kept that have to be read anew for each epoch; a negative ``num_workers``.
    """

    def __init__(
        self,
        images: ImageList,
        preparation: PicturePreparation,
        *,
        in_memory: bool | None = None,
        skip_bad: bool = False,
        num_workers: int = 4,
    ) -> None:
        if num_workers < 0:
            raise UserError(f"config: data.num_workers={num_workers} has to be 0 or more")
        is_drawn_anew = preparation.is_random and not preparation.on_device
        if in_memory and is_drawn_anew:
            raise UserError(
                "config: data.in_memory=True, but data.transform draws training images anew in each epoch; set "
                "data.in_memory=None, or data.on_device=True to keep them as they are before that"
            )
        if in_memory is None:
            # With on_device only reading them would tell their sizes.
            can_be_kept = not is_drawn_anew and not preparation.on_device
            in_memory = can_be_kept and len(images) * preparation.blank()[0].nbytes <= _MOST_KEPT
        self.images, self.skip_bad = images, skip_bad
        self.num_workers = 0 if in_memory else num_workers
        self._preparation, self._in_memory = preparation, in_memory
        self._kept: list[Tensor | BadSampleError] = []

    def __len__(self) -> int:
        return len(self.images)

    def warm_up(self, show_progress: bool = False) -> None:
        """Read all images that are to be kept, if that has not been done; a bad one is told when it is asked for.

        Args:
            show_progress: whether to show a bar where there are more than 1,000.
        """
        if not self._in_memory or self._kept:
            return
        num_images, num_threads = len(self.images), min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        is_shown = show_progress and num_images > _MOST_WITHOUT_BAR
        kept = []
        with (
            progress_bar("reading images", num_images, is_shown) as bar,
            ThreadPoolExecutor(num_threads) as pool,
        ):
            for image in pool.map(self._read, range(num_images)):
                kept.append(image)
                bar.advance()
        # Only now: one that was interrupted begins anew.
        self._kept = kept

    def item(self, epoch: int | None, index: int) -> Item:
        """See ``SampleSet``."""
        if not self._in_memory:
            return self._preparation.prepare(self.images.sample(index), epoch, index)
        self.warm_up()
        kept = self._kept[index]
        if isinstance(kept, BadSampleError):
            # A new one: an exception remembers where it has been raised, every time.
            raise BadSampleError(str(kept)) from kept
        return kept, self.images.labels[index]

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """See ``SampleSet``."""
        return self._preparation.finish(inputs, epoch, indices)

    def blank(self) -> Item:
        """See ``SampleSet``."""
        return self._preparation.blank()

    def _read(self, index: int) -> Tensor | BadSampleError:
        try:
            image, _ = self._preparation.prepare(self.images.sample(index), None, index)
        except BadSampleError as error:
            return error
        return image
