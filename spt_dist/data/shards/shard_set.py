"""A split of shards as a set of samples."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from spt_dist.data.samples import BadSampleError, Item, Preparation, RawSample, StreamedSet
from spt_dist.data.shards.index import ShardIndex
from spt_dist.data.shards.lane import LaneReader, Outcome, Plan
from spt_dist.data.shards.order import Ints, LaneOrder, deal_lanes
from spt_dist.data.shards.tar import IMAGES, LABEL, MASK, StoredSample
from spt_dist.data.task import SEGMENTATION


class ShardSet(StreamedSet):
    """The samples of a split.

    Args:
        location: where the shards are; see ``openers.open_stream``.
        index: what they are.
        split: the name of the split.
        preparation: what is made of a stored sample. A mask reaches it as the content of its file.
        lanes: from how many places of the split batches take their samples. A multiple of the number of ranks times
            ``num_workers`` lets each shard be read by one worker of one rank, but for those that two lanes share.
        window: how many samples are shuffled together; so many are held at most, over all ranks and workers.
        skip_bad, num_workers: as of ``StreamedSet``.

    Raises:
        UserError: the index has no such split.
    """

    def __init__(
        self,
        location: str,
        index: ShardIndex,
        split: str,
        preparation: Preparation,
        *,
        lanes: int = 16,
        window: int = 1000,
        skip_bad: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.skip_bad, self.num_workers = skip_bad, num_workers
        self._location, self._preparation = location, preparation
        self._shards = index.split(split, location).shards
        self._kind, self._num_classes = index.kind, len(index.classes)
        self._order = LaneOrder([shard.num_samples for shard in self._shards], lanes, window)

    def __len__(self) -> int:
        return sum(shard.num_samples for shard in self._shards)

    def order(self, epoch: int | None) -> Tensor:
        """As ``StreamedSet.order``: shards, and samples within windows, shuffled, and taken from the lanes in turn."""
        return self._order.order(epoch)

    def parts(self, epoch: int | None, indices: Sequence[int], num_parts: int) -> list[int]:
        """As ``StreamedSet.parts``: lanes are dealt out."""
        return deal_lanes(self._order.places(epoch, indices).lane_K.tolist(), num_parts)

    def stream(self, epoch: int | None, indices: Sequence[int]) -> Iterator[Item | BadSampleError]:
        """As ``StreamedSet.stream``. A damaged shard makes an error of each sample behind the damage."""
        if not len(indices):
            return
        lane_K, readers = self._plan(epoch, indices)
        left = np.bincount(lane_K)
        try:
            for lane, index in zip(lane_K.tolist(), indices, strict=True):
                outcome = readers[lane].take()
                left[lane] -= 1
                if not left[lane]:
                    readers.pop(lane).close()
                yield self._prepared(outcome, epoch, index)
        finally:
            for reader in readers.values():
                reader.close()

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """As ``Preparation.finish``."""
        return self._preparation.finish(inputs, epoch, indices)

    def blank(self) -> Item:
        """As ``Preparation.blank``."""
        return self._preparation.blank()

    def _plan(self, epoch: int | None, indices: Sequence[int]) -> tuple[Ints, dict[int, LaneReader]]:
        """The lane of each sample, and the lanes' readers."""
        places = self._order.places(epoch, indices)
        shard_K, position_K = self._order.find(np.asarray(indices, dtype=np.int64))
        readers = {}
        for lane in np.unique(places.lane_K).tolist():
            ours = np.flatnonzero(places.lane_K == lane)
            plan = Plan.of(places.sequence_K[ours], places.window_K[ours], shard_K[ours], position_K[ours])
            readers[lane] = LaneReader(self._location, self._shards, plan)
        return places.lane_K, readers

    def _prepared(self, outcome: Outcome, epoch: int | None, index: int) -> Item | BadSampleError:
        if isinstance(outcome, BadSampleError):
            return outcome
        name, stored = outcome
        try:
            raw = raw_sample(stored, name, self._kind, self._num_classes)
            return self._preparation.prepare(raw, epoch, index)
        except BadSampleError as error:
            return error


def raw_sample(stored: StoredSample, name: str, kind: str, num_classes: int) -> RawSample:
    """What a task needs of a stored sample: its only image, and its label or its mask.

    Args:
        stored: the sample.
        name: of it, for errors.
        kind: of the task: "classification" or "segmentation".
        num_classes: labels are 0 to one less.

    Raises:
        BadSampleError: one of them is missing, or there are two; or there is no such label.
    """
    if stored.problem:
        raise BadSampleError(f"{name}: {stored.problem}")
    images = [extension for extension in stored.files if extension in IMAGES]
    if len(images) != 1:
        raise BadSampleError(f"{name}: it has {len(images)} images, not one")
    target = MASK if kind == SEGMENTATION else LABEL
    if target not in stored.files:
        raise BadSampleError(f"{name}: it has no file .{target}")
    content = stored.files[target]
    return RawSample(
        name, stored.files[images[0]], content if target == MASK else read_label(content, num_classes, name)
    )


def read_label(content: bytes, num_classes: int, name: str) -> int:
    """The class in a file ``.cls``.

    Args:
        content: of the file: decimal digits.
        num_classes: how many classes there are.
        name: of the sample, for errors.

    Raises:
        BadSampleError: it is no integer, or there is no such class.
    """
    digits = content.strip()
    # int() takes much else: underscores, signs, the digits of other scripts.
    if not digits.isdigit() or len(digits) > 9:
        raise BadSampleError(f"{name}: its .cls is {content[:20]!r}; it has to be an integer")
    if int(digits) >= num_classes:
        raise BadSampleError(f"{name}: its class is {int(digits)}, but the classes are 0 to {num_classes - 1}")
    return int(digits)
