"""In which order the samples of shards are visited, so that each rank and each worker reads few shards.

The shards, laid end to end, are cut into lanes; a batch takes its samples from all lanes in turn.

Shape suffixes: N samples, S shards, K samples asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where samples are in an epoch's order.

    Attributes:
        sequence_K: int64, their places in the shards laid end to end as the epoch has them.
        lane_K: int64, their lanes.
        window_K: int64, the windows in which they are shuffled, counted through all lanes.
    """

    sequence_K: Ints
    lane_K: Ints
    window_K: Ints


class LaneOrder:
    """The order of each epoch.

    Shards come in a random order. Laid end to end they are cut into lanes, whose lengths differ by one at most. In each
    lane samples are shuffled within windows. Sample ``g`` of the epoch is the ``g // num_lanes``-th of lane
    ``g % num_lanes``. So with ``num_lanes`` a multiple of the number of ranks, and batches dealt out in turn, a rank
    meets only its own lanes.

    Args:
        num_samples: of each shard.
        num_lanes: how many lanes.
        window: how many samples are shuffled together, over all lanes.
    """

    def __init__(self, num_samples: Sequence[int], num_lanes: int, window: int) -> None:
        self._sizes_S: Ints = np.asarray(num_samples, dtype=np.int64)
        self._ends_S: Ints = np.cumsum(self._sizes_S)
        self._num_lanes = num_lanes
        self._window = max(1, window // num_lanes)
        self._num_samples = int(self._sizes_S.sum())

    def order(self, epoch: int | None) -> Tensor:
        """Indices in the order of an epoch: int64 ``(N,)``; ``None`` for shards and samples as they lie."""
        starts_S = self._ends_S - self._sizes_S
        shards_S = self._shards(epoch)
        sizes_S = self._sizes_S[shards_S]
        shifts_S = starts_S[shards_S] - (np.cumsum(sizes_S) - sizes_S)
        places_N = np.arange(self._num_samples)
        indices_N = places_N + np.repeat(shifts_S, sizes_S)
        if epoch is not None:
            indices_N = indices_N[self._within_windows(places_N, epoch)]
        lanes_N, rounds_N = places_N % self._num_lanes, places_N // self._num_lanes
        return torch.from_numpy(indices_N[self._lane_start(lanes_N) + rounds_N])

    def places(self, epoch: int | None, indices: Sequence[int]) -> Places:
        """Where samples are in ``order(epoch)``.

        Args:
            epoch: of the order.
            indices: of ``K`` samples.
        """
        indices_K: Ints = np.asarray(indices, dtype=np.int64)
        shards_S = self._shards(epoch)
        sizes_S = self._sizes_S[shards_S]
        starts_S = np.empty_like(sizes_S)
        starts_S[shards_S] = np.cumsum(sizes_S) - sizes_S
        shard_K, position_K = self.find(indices_K)
        sequence_K = starts_S[shard_K] + position_K
        lane_K = self._lane(sequence_K)
        return Places(sequence_K, lane_K, self._window_of(sequence_K, lane_K))

    def find(self, indices_K: Ints) -> tuple[Ints, Ints]:
        """The shards of samples, and their positions in them: int64 ``(K,)`` each."""
        shard_K: Ints = np.searchsorted(self._ends_S, indices_K, side="right")
        return shard_K, indices_K - (self._ends_S - self._sizes_S)[shard_K]

    def _shards(self, epoch: int | None) -> Ints:
        if epoch is None:
            return np.arange(len(self._sizes_S))
        shards_S: Ints = torch.randperm(len(self._sizes_S), generator=_generator(epoch)).numpy()
        return shards_S

    def _within_windows(self, places_N: Ints, epoch: int) -> Ints:
        """A permutation of places that leaves each in its window."""
        generator = _generator(epoch)
        # Not the numbers that have shuffled the shards.
        torch.randperm(len(self._sizes_S), generator=generator)
        shuffled_N: Ints = torch.randperm(self._num_samples, generator=generator).numpy()
        window_N = self._window_of(places_N, self._lane(places_N))
        return shuffled_N[np.argsort(window_N[shuffled_N], kind="stable")]

    def _lane_start(self, lanes: Ints) -> Ints:
        """Where lanes begin in the sequence. The first ``num_samples % num_lanes`` are longer by one."""
        short, num_longer = divmod(self._num_samples, self._num_lanes)
        starts: Ints = lanes * short + np.minimum(lanes, num_longer)
        return starts

    def _lane(self, sequence: Ints) -> Ints:
        starts = self._lane_start(np.arange(self._num_lanes))
        lanes: Ints = np.searchsorted(starts, sequence, side="right") - 1
        return lanes

    def _window_of(self, sequence: Ints, lanes: Ints) -> Ints:
        most_in_lane = -(-self._num_samples // self._num_lanes)
        windows_in_lane = -(-most_in_lane // self._window)
        windows: Ints = lanes * windows_in_lane + (sequence - self._lane_start(lanes)) // self._window
        return windows


def deal_lanes(lanes: Sequence[int], num_parts: int) -> list[int]:
    """Which worker reads each of a rank's samples.

    Lanes are dealt out to workers. Where there are fewer of them than workers, several share a lane: each then reads
    all of it, but decodes only its own samples. So do all workers where samples come lane after lane, for otherwise
    only one would be at work at a time.

    Args:
        lanes: of each sample, in the order in which they are wanted.
        num_parts: number of workers.
    """
    if 2 * sum(before != after for before, after in pairwise(lanes)) < len(lanes):
        return [place % num_parts for place in range(len(lanes))]
    met = {lane: place for place, lane in enumerate(sorted(set(lanes)))}
    seen = dict.fromkeys(met, 0)
    parts = []
    for lane in lanes:
        sharing = range(met[lane] % num_parts, num_parts, len(met))
        parts.append(sharing[seen[lane] % len(sharing)])
        seen[lane] += 1
    return parts


def _generator(epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(epoch)
