"""Shards through the loader: with workers, on several ranks, resumed, with samples left out."""

import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from spt_dist import UserError
from spt_dist.data.batches import GlobalBatches, deal_samples
from spt_dist.data.loader import Skipped, load_batches, order_of
from tests.data.shards.shards_for_tests import open_set, write_shards
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SIZES = [13, 5, 20, 1, 9, 16]
NUM_SAMPLES = sum(SIZES)
BATCH, SEED = 8, 3

Steps = list[list[tuple[int, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES)


def steps_of(folder: Path, num_workers: int, rank: int, world_size: int, first: int, last: int) -> Steps:
    """Numbers and weights of a rank's part of each step, as they arrive."""
    samples = open_set(folder, lanes=4, window=12, num_workers=num_workers)
    batches = GlobalBatches(len(samples), BATCH, rank, world_size, SEED, order=order_of(samples))
    return [
        list(zip(batch.inputs[:, 0].int().tolist(), batch.weights.tolist(), strict=True))
        for batch in load_batches(samples, batches.steps(first, last), CPU)
    ]


def rank_steps(folder: Path, num_workers: int, first: int, last: int) -> Steps:
    # The helper's processes are daemons, which may have no children (these end with their loader), and would start them
    # by importing everything anew.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return steps_of(folder, num_workers, dist.get_rank(), dist.get_world_size(), first, last)


def counted(ranks: list[Steps]) -> list[list[int]]:
    """The samples of each global batch that have weight, over all ranks."""
    return [sorted(n for part in parts for n, weight in part if weight) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_epochs_are_whole_and_the_same_for_every_number_of_workers(folder: Path, num_workers: int) -> None:
    steps = steps_of(folder, num_workers, 0, 1, 0, 16)
    assert steps == steps_of(folder, 0, 0, 1, 0, 16)
    first, second = ([n for step in steps[at : at + 8] for n, _ in step] for at in (0, 8))
    assert sorted(first) == sorted(second) == list(range(NUM_SAMPLES)) and first != second


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_next_sample(folder: Path, num_workers: int) -> None:
    whole = steps_of(folder, 0, 0, 1, 0, 16)
    for first in (3, 8, 11):
        assert steps_of(folder, num_workers, 0, 1, first, 16) == whole[first:]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ids_that_are_chosen_arrive_once(folder: Path, world_size: int, num_workers: int) -> None:
    samples = open_set(folder, lanes=4, window=12, num_workers=num_workers)
    chosen = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(0))[:29].sort().values.tolist()
    for same_batches in (True, False):
        arrived = [
            number
            for rank in range(world_size)
            for batch in load_batches(samples, deal_samples(chosen, 4, rank, world_size, same_batches), CPU)
            for number in batch.inputs[:, 0].int().tolist()
        ]
        assert sorted(arrived) == chosen


@pytest.mark.distributed
def test_ranks_together_see_what_one_sees(folder: Path) -> None:
    whole = counted([steps_of(folder, 0, 0, 1, 0, 16)])
    for world_size, num_workers in ((1, 1), (2, 2), (4, 1)):
        ranks = run_ranks(rank_steps, world_size, folder, num_workers, 0, 16)
        assert counted(ranks) == whole
        assert len({tuple(map(len, rank)) for rank in ranks}) == 1, "all run batches of the same size"
    # A run of two ranks stops behind step 5 and goes on with four.
    assert counted(run_ranks(rank_steps, 4, folder, 1, 5, 16)) == whole[5:]


def cut(folder: Path) -> set[int]:
    """Cut off a shard, and flip a bit in another; returns the samples that are then bad."""
    third = folder / "train-000002.tar"
    third.write_bytes(third.read_bytes()[:20_000])
    fifth = (folder / "train-000004.tar").read_bytes()
    (folder / "train-000004.tar").write_bytes(fifth.replace(b"40 ", b"41 ", 1))
    found = open_set(folder, lanes=1).stream(None, range(NUM_SAMPLES))
    return {index for index, item in enumerate(found) if isinstance(item, Exception)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_end_the_run_or_are_left_out_with_a_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    folder = write_shards(tmp_path, SIZES)
    bad = cut(folder)
    assert 40 in bad and 37 in bad and 18 not in bad and len(bad) < 20
    samples = open_set(folder, lanes=4, window=12, num_workers=num_workers)
    batches = GlobalBatches(len(samples), BATCH, seed=SEED, order=order_of(samples))
    with pytest.raises(UserError, match=r"train-00000[24].tar: sample \d+ of (20|9)"):
        list(load_batches(samples, batches.epoch(), CPU))
    samples.skip_bad = True
    skipped = Skipped()
    with caplog.at_level(logging.WARNING):
        steps = list(load_batches(samples, batches.epoch(), CPU, skipped))
    good = [int(row[0]) for step in steps for row, weight in zip(step.inputs, step.weights, strict=True) if weight]
    assert sorted(good) == [index for index in range(NUM_SAMPLES) if index not in bad]
    assert skipped.indices == bad
    assert "train-000004.tar: sample 1 of 9 (key '000040')" in caplog.text
