"""Reading the samples of one lane that are asked for, with one shard open at a time."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from spt_dist.data.samples import BadSampleError
from spt_dist.data.shards.index import Shard
from spt_dist.data.shards.openers import Stream, is_local, open_stream, shown
from spt_dist.data.shards.order import Ints
from spt_dist.data.shards.tar import SampleReader, StoredSample

Outcome = tuple[str, StoredSample] | BadSampleError
"""What a sample is called in errors, and the sample; or why there is none."""

_PAUSES: Final = (1.0, 5.0)
"""Seconds before each further attempt at what does not come from a disk."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a lane's reader reads, and when it is asked for it.

    Attributes:
        shards: place in the split of the shard of each sample, in the order of reading.
        positions: of each sample in its shard.
        uses: how often each is asked for.
        entries: for each request, which of these samples it is for.
    """

    shards: list[int]
    positions: list[int]
    uses: list[int]
    entries: list[int]

    @classmethod
    def of(cls, sequence_K: Ints, window_K: Ints, shard_K: Ints, position_K: Ints) -> "Plan":
        """Plan to read forward what is asked for in a row from one window.

        Args:
            sequence_K, window_K: ``order.Places`` of the samples that are asked for, in the order of asking.
            shard_K, position_K: their shards, and positions in them.
        """
        # A window that is met again later is read again, rather than kept until then.
        run_K = np.cumsum(np.diff(window_K, prepend=window_K[:1]) != 0)
        _, first_E, entry_K, uses_E = np.unique(
            run_K * (sequence_K.max() + 1) + sequence_K, return_index=True, return_inverse=True, return_counts=True
        )
        return cls(shard_K[first_E].tolist(), position_K[first_E].tolist(), uses_E.tolist(), entry_K.tolist())


class LaneReader:
    """Hands out the samples of a lane one after another.

    Args:
        location: where the shards are.
        shards: of the split.
        plan: which samples.
    """

    def __init__(self, location: str, shards: Sequence[Shard], plan: Plan) -> None:
        self._location, self._shards, self._plan = location, shards, plan
        self._requests = iter(plan.entries)
        self._uses = list(plan.uses)
        self._waiting: dict[int, Outcome] = {}
        self._num_read = 0
        self._open: _OpenShard | None = None

    @property
    def num_waiting(self) -> int:
        """Samples that have been read, but not asked for so far."""
        return len(self._waiting)

    def take(self) -> Outcome:
        """The sample of the next request."""
        entry = next(self._requests)
        while entry >= self._num_read:
            self._waiting[self._num_read] = self._read(self._num_read)
            self._num_read += 1
        self._uses[entry] -= 1
        return self._waiting[entry] if self._uses[entry] else self._waiting.pop(entry)

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _read(self, entry: int) -> Outcome:
        place, position = self._plan.shards[entry], self._plan.positions[entry]
        if self._open is None or self._open.place != place or self._open.position > position:
            self.close()
            self._open = _OpenShard(self._location, place, self._shards[place])
        outcome = self._open.sample(position)
        following = entry + 1
        if following == len(self._plan.shards) or self._plan.shards[following] != place:
            self.close()
        return outcome


class _OpenShard:
    """A shard that is read forward; again from its beginning, if a transfer breaks off."""

    def __init__(self, location: str, place: int, shard: Shard) -> None:
        self.place = place
        self._location, self._shard = location, shard
        self._path = shown(location, shard.name)
        self._pauses = [] if is_local(location) else list(_PAUSES)
        self._stream: Stream | None = None
        self._reader: SampleReader | None = None
        self._broken = ""

    @property
    def position(self) -> int:
        """The first that can still be read."""
        return 0 if self._reader is None else self._reader.position

    def sample(self, position: int) -> Outcome:
        """One that is not behind us."""
        while not self._broken:
            try:
                sample = self._try(position)
                if sample is not None:
                    return self._checked(position, sample)
                why = self._why()
            except OSError as error:
                why = f"it can't be opened ({error.strerror or error})"
            if self._pauses:
                self.close()
                pause = self._pauses.pop(0)
                _logger.warning("%s: %s; it is begun again in %g s", self._path, why, pause)
                time.sleep(pause)
            else:
                self._broken = why
        return BadSampleError(f"{self._name(position)}: {self._broken}")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._reader = None

    def _try(self, position: int) -> StoredSample | None:
        if self._stream is None or self._reader is None:
            self._stream = open_stream(self._location, self._shard.name)
            self._reader = SampleReader(self._stream)
        if not self._reader.pass_over(position - self._reader.position):
            return None
        sample = self._reader.read()
        # The last one before a break may lack some of its files.
        is_cut = sample is not None and bool(self._reader.end) and not self._is_as_indexed(position, sample)
        return None if is_cut else sample

    def _why(self) -> str:
        assert self._stream is not None and self._reader is not None
        failure = self._stream.failure()
        told = f" ({failure})" if failure else ""
        return f"the shard breaks off before it is complete: {self._reader.end}{told}"

    def _checked(self, position: int, sample: StoredSample) -> Outcome:
        name = self._name(position, sample.key)
        # What has a problem of its own has not been read in full.
        if sample.problem or self._is_as_indexed(position, sample):
            return name, sample
        problem = "its content is not what the index has a checksum of; the shard is damaged, or another one"
        return BadSampleError(f"{name}: {problem}")

    def _is_as_indexed(self, position: int, sample: StoredSample) -> bool:
        return sample.checksum == self._shard.checksum(position)

    def _name(self, position: int, key: str | None = None) -> str:
        told = "" if key is None else f" (key {key[:80]!r})"
        return f"{self._path}: sample {position:,} of {self._shard.num_samples:,}{told}"
