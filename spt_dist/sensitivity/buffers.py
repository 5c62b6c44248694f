"""Where scores are summed up during the pass, and how they get to the ranks that own them.

``LocalBuffer`` keeps all N sums on each rank and adds the ranks up once, at the end: the least traffic.
``ShardedBuffer`` keeps N / W sums a rank and sends each layer's contribution to its owner while the backward pass goes
on: the least memory, but the ranks have to go through their batches in lockstep.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, get_rank, shard_bounds, world_size

logger = logging.getLogger(__name__)

# 32 MiB: large enough for a network's full speed, small beside any model's activations.
BUCKET_SIZE = 1 << 23

# The parameters that are scored together: their names, and for each where it starts and its shape.
Unit = Mapping[str, tuple[int, tuple[int, ...]]]


class LocalBuffer:
    """All sums on every rank, ``N`` floats."""

    def __init__(self, index: FlatIndex, units: Mapping[str, Unit], device: torch.device) -> None:
        self._index = index
        self._flat = torch.zeros(index.total, dtype=torch.float32, device=device)
        self._views = {
            unit: {name: self._flat[start : start + prod(shape)].view(shape) for name, (start, shape) in part.items()}
            for unit, part in units.items()
        }

    @contextmanager
    def sums(self, unit: str) -> Iterator[dict[str, Tensor]]:
        """The sums of one unit, fp32 in the parameters' shapes, to be added to."""
        yield self._views[unit]

    def end_batch(self) -> None:
        """One batch is done."""

    def finish(self, factor: float) -> ScoreShard:
        """The sums over all ranks times ``factor``; this rank's part. Collective."""
        start, stop = shard_bounds(self._index.total, world_size(), get_rank())
        flat = self._flat if factor == 1 else self._flat.mul_(factor)
        if world_size() == 1:
            return ScoreShard(self._index, 0, flat)
        for owner, low, high in _cut_into_buckets(self._index.total, BUCKET_SIZE):
            dist.reduce(flat[low:high], dst=owner)
        return ScoreShard(self._index, start, flat[start:stop].clone())


class ShardedBuffer:
    """This rank's part of the sums, ``N / W`` floats, and two buckets on their way.

    A bucket is a run of the flat index space within one rank's part. The backward pass goes through a model from its
    end, and so are the buckets filled, sent and freed: in descending order, the same on every rank. (Layers that finish
    out of order only keep their buckets open for longer.)
    """

    def __init__(self, index: FlatIndex, units: Mapping[str, Unit], device: torch.device) -> None:
        start, stop = shard_bounds(index.total, world_size(), get_rank())
        self._shard = ScoreShard(index, start, torch.zeros(stop - start, dtype=torch.float32, device=device))
        self._units = units
        self._buckets = _cut_into_buckets(index.total, BUCKET_SIZE)
        self._open: dict[int, Tensor] = {}
        self._free: list[Tensor] = []
        self._in_flight: tuple[int, Tensor, dist.Work] | None = None
        self._start_batch()

    def _start_batch(self) -> None:
        self._next = len(self._buckets) - 1
        self._missing = [high - low for _, low, high in self._buckets]

    @contextmanager
    def sums(self, unit: str) -> Iterator[dict[str, Tensor]]:
        """Zeros in the shapes of one unit, to be added to; they go on their way when the block ends."""
        device = self._shard.values.device
        part = self._units[unit]
        sums = {name: torch.zeros(shape, dtype=torch.float32, device=device) for name, (_, shape) in part.items()}
        yield sums
        for name in sorted(part, key=lambda name: part[name][0], reverse=True):
            self._add(part[name][0], sums.pop(name).flatten())

    def end_batch(self) -> None:
        """One batch is done: what has had no gradient contributes nothing."""
        self._missing = [0] * len(self._buckets)
        self._send_complete()
        self._receive()
        self._start_batch()

    def finish(self, factor: float) -> ScoreShard:
        """The sums over all ranks times ``factor``; this rank's part. Collective."""
        self._shard.values.mul_(factor)
        return self._shard

    def _add(self, start: int, flat: Tensor) -> None:
        """Put a contribution into its buckets, from the last to the first."""
        stop = start + len(flat)
        for place in range(len(self._buckets) - 1, -1, -1):
            _, low, high = self._buckets[place]
            first, last = max(low, start), min(high, stop)
            if first < last:
                self._bucket(place)[first - low : last - low] += flat[first - start : last - start]
                self._missing[place] -= last - first
                self._send_complete()

    def _bucket(self, place: int) -> Tensor:
        if place not in self._open:
            _, low, high = self._buckets[place]
            if not self._free:
                self._free.append(self._shard.values.new_zeros(max(high - low for _, low, high in self._buckets)))
            self._open[place] = self._free.pop()
        _, low, high = self._buckets[place]
        return self._open[place][: high - low]

    def _send_complete(self) -> None:
        while self._next >= 0 and self._missing[self._next] == 0:
            self._receive()
            bucket = self._bucket(self._next)
            work = dist.reduce(bucket, dst=self._buckets[self._next][0], async_op=True)
            assert work is not None
            self._in_flight = (self._next, self._open.pop(self._next), work)
            self._next -= 1

    def _receive(self) -> None:
        """Wait for the bucket on its way, and keep it if it is this rank's."""
        if self._in_flight is None:
            return
        place, storage, work = self._in_flight
        work.wait()
        owner, low, high = self._buckets[place]
        if owner == get_rank():
            self._shard.values[low - self._shard.start : high - self._shard.start] += storage[: high - low]
        self._free.append(storage.zero_())
        self._in_flight = None


Buffer = LocalBuffer | ShardedBuffer


def make_buffer(index: FlatIndex, units: Mapping[str, Unit], device: torch.device, sharded: bool) -> Buffer:
    """A buffer for the scores of ``units``, and a word in the log about which.

    Args:
        index: the flat index space.
        units: what is scored together; each parameter of a unit is one run of the index space.
        device: of the model.
        sharded: whether the sums are to be kept in parts over the ranks; one rank has no parts.
    """
    kind = ShardedBuffer if sharded and world_size() > 1 else LocalBuffer
    words = "in parts over the ranks" if kind is ShardedBuffer else "whole on each rank"
    if get_rank() == 0:
        logger.info("sums of %s scores are kept %s", f"{index.total:,}", words)
    return kind(index, units, device)


def _cut_into_buckets(total: int, bucket_size: int) -> list[tuple[int, int, int]]:
    """Runs ``(owner, start, stop)`` of at most ``bucket_size`` positions, none in the parts of two ranks."""
    buckets = []
    for owner in range(world_size()):
        start, stop = shard_bounds(total, world_size(), owner)
        buckets += [(owner, low, min(low + bucket_size, stop)) for low in range(start, stop, bucket_size)]
    return buckets
