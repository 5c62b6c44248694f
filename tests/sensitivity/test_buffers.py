"""Sums over ranks, whole and in parts: the same numbers, and as many bytes as promised."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spt_dist import estimate_sensitivity
from spt_dist.models.matrices import take_inventory
from spt_dist.sensitivity import buffers
from spt_dist.sensitivity.buffers import LocalBuffer, ShardedBuffer
from spt_dist.sensitivity.modes import scoring_mode
from spt_dist.sensitivity.scoring import PassOptions, ScoringPass
from spt_dist.sensitivity.shards import FlatIndex
from tests.models_for_tests import make_samples, make_vit
from tests.ranks import run_ranks

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 2, 2), "c.weight": (11,), "d.weight": (1, 4)}
INDEX = FlatIndex(tuple(SHAPES), tuple(SHAPES.values()))
UNITS: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {
    "a": {"weight": (0, (7, 5)), "bias": (35, (7,))},
    "b": {"weight": (42, (3, 2, 2))},
    "c": {"weight": (54, (11,))},
    "d": {"weight": (65, (1, 4))},
}


def contribution(rank: int, batch: int, unit: str, shape: tuple[int, ...]) -> Tensor:
    """What a rank adds in a batch; whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(10_000 * rank + 1_000 * batch + ord(unit))
    return torch.randint(1000, shape, generator=generator).float()


def sum_up(kind: type[LocalBuffer] | type[ShardedBuffer], bucket_size: int, seed: int) -> tuple[int, Tensor]:
    """Three batches in which layers finish in some order, the same on each rank, and some have no gradient."""
    buffers.BUCKET_SIZE = bucket_size
    order = random.Random(seed)
    buffer = kind(INDEX, UNITS, torch.device("cpu"))
    for batch in range(3):
        units = list(UNITS)
        if seed:
            order.shuffle(units)
            del units[order.randrange(3, 5) :]
        for unit in reversed(units):
            with buffer.sums(unit) as sums:
                for total in sums.values():
                    total += contribution(dist.get_rank(), batch, unit, tuple(total.shape))
        buffer.end_batch()
    shard = buffer.finish(0.5)
    return shard.start, shard.values


CASES = [(bucket_size, seed) for bucket_size in (4, 17, 1000) for seed in (0, 1, 2)]


def sum_up_all() -> list[tuple[tuple[int, Tensor], tuple[int, Tensor]]]:
    """Every case with both buffers."""
    return [(sum_up(LocalBuffer, *case), sum_up(ShardedBuffer, *case)) for case in CASES]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parts_hold_what_whole_sums_do(world_size: int) -> None:
    everything = [
        contribution(rank, batch, unit, shape).flatten()
        for unit, part in UNITS.items()
        for _, shape in part.values()
        for rank in range(world_size)
        for batch in range(3)
    ]
    times = 3 * world_size
    wanted = torch.cat([sum(everything[i + 1 : i + times], everything[i]) for i in range(0, len(everything), times)])
    length = -(-INDEX.total // world_size)
    for (_, seed), ranks in zip(CASES, zip(*run_ranks(sum_up_all, world_size), strict=True), strict=True):
        whole, parts = ([rank[kind] for rank in ranks] for kind in (0, 1))
        for found in (whole, parts):
            assert [start for start, _ in found] == [min(rank * length, INDEX.total) for rank in range(world_size)]
        sums = torch.cat([values for _, values in parts])
        assert torch.equal(sums, torch.cat([values for _, values in whole]))
        if seed == 0:
            assert torch.equal(sums, 0.5 * wanted)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {item.untyped_storage()._cdata for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)}
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor) and item.untyped_storage()._cdata not in known:
                storage = item.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


MODEL: dict[str, Any] = {"embed_dim": 96, "depth": 8}
BUCKET = 16_384


def peaks() -> dict[str, int]:
    """Peak bytes of the same pass without sums, with whole sums and with sums in parts; and the number of scores."""
    buffers.BUCKET_SIZE = BUCKET
    images, labels = make_samples(2)
    model = make_vit(**MODEL)
    found = {}
    scoring = ScoringPass(
        model, take_inventory(model), F.cross_entropy, PassOptions(True, None, False, None), torch.device("cpu")
    )
    with scoring_mode(model, False), scoring.attached(), LiveBytes() as live:
        scoring.observe(images[:1], labels[:1], lambda name, scores: None)
    found["pass"] = live.peak
    for shard_sums in (False, True):
        with LiveBytes() as live:
            scores = estimate_sensitivity(
                model, [(images, labels)], F.cross_entropy, micro_batch=1, shard_sums=shard_sums
            )
        found["parts" if shard_sums else "whole"] = live.peak
        found["N"] = scores.shard.index.total
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_memory_is_a_part_of_the_sums_and_two_buckets(world_size: int) -> None:
    for found in run_ranks(peaks, world_size):
        all_sums, slack = 4 * found["N"], 64_000
        # What the pass itself needs, one layer's scores included, is counted without any sums.
        assert found["whole"] - found["pass"] > all_sums - slack
        assert found["parts"] - found["pass"] < all_sums / world_size + 2 * 4 * BUCKET + slack
