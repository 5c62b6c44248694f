"""The score buffer: one flat index space over all eligible weights, owned in equal contiguous parts by the ranks."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def collective_device() -> torch.device:
    """Where tensors have to be for the process group's collectives; the CPU without one."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def all_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over the ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(value: int) -> int:
    """The largest value of any rank."""
    largest = torch.tensor(value, device=collective_device())
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


@dataclass(frozen=True)
class FlatIndex:
    """Where each named tensor lies in the flat index space: ``names[k]`` fills ``offsets[k] .. offsets[k+1]``."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """``len(names) + 1`` positions; the last is the total number of weights."""
        return (0, *accumulate(prod(shape) for shape in self.shapes))

    @property
    def total(self) -> int:
        """Number of weights in all."""
        return self.offsets[-1]

    @cached_property
    def position(self) -> dict[str, int]:
        """Name -> its place in ``names``."""
        return {name: place for place, name in enumerate(self.names)}


@dataclass(frozen=True)
class ScoreShard:
    """This rank's part of the scores.

    Attributes:
        index: the flat index space.
        start: the first flat position owned by this rank.
        values: fp32, the scores of ``start .. start + len(values)``; shorter, even empty, on the last ranks.
    """

    index: FlatIndex
    start: int
    values: Tensor

    def segments(self) -> Iterator[tuple[int, slice, int]]:
        """The named tensors that this rank owns a part of.

        Yields:
            ``(place, part, first)``: the name's place in the index, the slice of ``values`` that belongs to it, and
            the position within the named tensor of the slice's first element.
        """
        stop = self.start + len(self.values)
        for place, (low, high) in enumerate(zip(self.index.offsets, self.index.offsets[1:], strict=False)):
            first, last = max(low, self.start), min(high, stop)
            if first < last:
                yield place, slice(first - self.start, last - self.start), first - low

    def gather(self, name: str) -> Tensor:
        """The whole named tensor on every rank, fp32 in its own shape. Collective."""
        place = self.index.position[name]
        whole = torch.zeros(prod(self.index.shapes[place]), dtype=self.values.dtype, device=self.values.device)
        for other, part, first in self.segments():
            if other == place:
                whole[first : first + part.stop - part.start] = self.values[part]
        return all_sum(whole).view(self.index.shapes[place])


def restrict(shard: ScoreShard, names: Collection[str]) -> ScoreShard:
    """The scores of some names alone: a smaller index space, in which each rank keeps what it owns of them.

    No communication: a rank's part stays contiguous, but the parts become uneven, and any of them may be empty. The
    values are a view of the shard's unless the names left out lie between others that this rank owns.

    Args:
        shard: the scores.
        names: which to keep, from ``shard.index.names``; they stay in the order of the index.
    """
    index = shard.index
    kept = sorted({index.position[name] for name in names})
    if len(kept) == len(index.names):
        return shard
    smaller = FlatIndex(tuple(index.names[place] for place in kept), tuple(index.shapes[place] for place in kept))
    start = sum(min(index.offsets[place + 1], shard.start) - min(index.offsets[place], shard.start) for place in kept)
    mine = set(kept)
    parts = [part for place, part, _ in shard.segments() if place in mine]
    if not parts:
        return ScoreShard(smaller, start, shard.values[:0])
    whole = slice(parts[0].start, parts[-1].stop)
    if whole.stop - whole.start == sum(part.stop - part.start for part in parts):
        return ScoreShard(smaller, start, shard.values[whole])
    return ScoreShard(smaller, start, torch.cat([shard.values[part] for part in parts]))


def shard_bounds(total: int, num_shards: int, shard: int) -> tuple[int, int]:
    """``(start, stop)`` of one of ``num_shards`` equal contiguous parts of ``total`` positions."""
    size = -(-total // num_shards)
    return min(shard * size, total), min((shard + 1) * size, total)
