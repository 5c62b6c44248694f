"""Reading dealt batches: workers, bad samples, sets that are streamed."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data._utils import signal_handling

from spt_dist import UserError
from spt_dist.data.batches import GlobalBatches
from spt_dist.data.loader import Batch, Skipped, load_batches, order_of
from spt_dist.data.samples import BadSampleError, Item, SampleSet, StreamedSet
from tests.data.shards.shards_for_tests import write_shards

CPU = torch.device("cpu")
NUM_SAMPLES = 23
BAD = {3, 7, 8}


class Numbered(SampleSet):
    """A sample is its index and its epoch; some may be bad. Sizes differ where ``ragged``, until they are finished."""

    def __init__(self, num_workers: int = 0, bad: set[int] = BAD, skip_bad: bool = True, ragged: bool = False) -> None:
        self.num_workers, self.bad, self.skip_bad, self.ragged = num_workers, bad, skip_bad, ragged

    def __len__(self) -> int:
        return NUM_SAMPLES

    def item(self, epoch: int | None, index: int) -> Item:
        if index in self.bad:
            raise BadSampleError(f"images/{index}.jpg: is cut off")
        length = 2 + index % 3 if self.ragged else 2
        return torch.tensor([index, (epoch or 0) % 256] + [0] * (length - 2), dtype=torch.uint8), index

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        numbers = [int(each[0]) for each in inputs]
        # A bad one is stood for by a good one of its batch, or by a blank.
        assert numbers == list(indices) or set(numbers) == {255}
        return torch.stack([each[:2].float() for each in inputs])

    def blank(self) -> Item:
        return torch.tensor([255, 255], dtype=torch.uint8), 0


class Streamed(Numbered, StreamedSet):
    """The same in an order of its own, odd ones before even ones, one worker for each."""

    def order(self, epoch: int | None) -> Tensor:
        places = torch.arange(NUM_SAMPLES)
        return torch.cat([places[1::2], places[::2]])

    def parts(self, epoch: int | None, indices: Sequence[int], num_parts: int) -> list[int]:
        return [index % num_parts for index in indices]

    def stream(self, epoch: int | None, indices: Sequence[int]) -> Iterator[Item | BadSampleError]:
        for index in indices:
            try:
                yield self.item(epoch, index)
            except BadSampleError as error:
                yield error


def read_all(
    dataset: Numbered, seed: int | None = 0, world_size: int = 1, rank: int = 0, first: int = 0, last: int = 12
) -> tuple[list[Batch], Skipped]:
    batches = GlobalBatches(NUM_SAMPLES, 4, rank, world_size, seed, order=order_of(dataset))
    skipped = Skipped()
    return list(load_batches(dataset, batches.steps(first, last), CPU, skipped)), skipped


@pytest.mark.parametrize("kind", [Numbered, Streamed])
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_workers_read_what_the_rank_itself_reads(kind: type[Numbered], num_workers: int, ragged: bool) -> None:
    wanted, alone = read_all(kind(ragged=ragged))
    found, skipped = read_all(kind(num_workers, ragged=ragged))
    assert len(wanted) == len(found) == 12
    for own, other in zip(wanted, found, strict=True):
        assert own.samples == other.samples
        assert torch.equal(own.weights, other.weights)
        good = own.weights > 0
        assert torch.equal(own.inputs[good], other.inputs[good])
        assert torch.equal(own.targets[good], other.targets[good])
    assert skipped.indices == alone.indices == BAD


@pytest.mark.parametrize("kind", [Numbered, Streamed])
def test_samples_come_in_their_places_with_their_epoch(kind: type[Numbered]) -> None:
    per_epoch = 6
    for step, batch in enumerate(read_all(kind(2), seed=5)[0]):
        for place, index in enumerate(batch.samples):
            assert bool(batch.weights[place] == 0) == (index in BAD)
            if index not in BAD:
                # Epochs are keyed by the seed, see epoch_key; the images hold 8 bits of it.
                key = (5 * 1_000_003 + step // per_epoch) % 256
                assert batch.inputs[place].tolist() == [index, key]
                assert batch.targets[place] == index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_next_sample(num_workers: int) -> None:
    whole, _ = read_all(Streamed(num_workers))
    rest, _ = read_all(Streamed(num_workers), first=8)
    assert [batch.samples for batch in rest] == [batch.samples for batch in whole[8:]]


def test_a_set_s_own_order_is_kept_for_every_number_of_ranks() -> None:
    wanted = [index for batch in read_all(Streamed(bad=set()), last=6)[0] for index in batch.samples]
    assert wanted == [*range(1, NUM_SAMPLES, 2), *range(0, NUM_SAMPLES, 2)]
    ranks = [read_all(Streamed(bad=set()), world_size=2, rank=rank, last=6)[0] for rank in range(2)]
    for step, (first, second) in enumerate(zip(*ranks, strict=True)):
        both = [index for pair in zip(first.samples, second.samples, strict=True) for index in pair]
        counted = torch.stack([first.weights, second.weights], dim=1).flatten().tolist()
        assert [index for index, weight in zip(both, counted, strict=True) if weight] == wanted[4 * step : 4 * step + 4]


def test_a_part_without_a_good_sample_is_blank() -> None:
    batches, skipped = read_all(Numbered(2, bad=set(range(NUM_SAMPLES))), last=2)
    assert all(batch.weights.sum() == 0 for batch in batches)
    assert all(batch.inputs.shape == (4, 2) and batch.targets.shape == (4,) for batch in batches)
    assert len(skipped.indices) == 8


@pytest.mark.parametrize("kind", [Numbered, Streamed])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_ends_the_run_where_none_are_left_out(kind: type[Numbered], num_workers: int) -> None:
    with pytest.raises(UserError) as raised:
        read_all(kind(num_workers, bad={7}, skip_bad=False))
    assert str(raised.value) == "images/7.jpg: is cut off"


@pytest.mark.parametrize("kind", [Numbered, Streamed])
def test_a_bad_sample_ends_the_run_before_others_are_read(
    kind: type[Numbered], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def item(self: Numbered, epoch: int | None, index: int) -> Item:
        asked.append(index)
        return own(self, epoch, index)

    own = Numbered.item
    monkeypatch.setattr(Numbered, "item", item)
    # The second of the first batch of four.
    with pytest.raises(UserError):
        read_all(kind(bad={1, 3}, skip_bad=False), seed=None)
    assert asked == ([0, 1] if kind is Numbered else [1])


def test_bad_samples_are_named_once_and_not_without_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_all(Numbered(bad=set(range(1, NUM_SAMPLES))), seed=None, last=24)
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0] == "left out: images/1.jpg: is cut off"
    assert len(texts) == len(set(texts)) == 11
    assert "without being named" in texts[-1]


def test_reading_leaves_the_random_numbers_of_the_process_alone() -> None:
    before = torch.get_rng_state()
    read_all(Numbered(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_signal_that_comes_when_workers_are_just_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """They outlive it, though torch has its own way with signals before it asks for ours; the rank hears as before."""
    set_handlers = signal_handling._set_worker_signal_handlers

    def set_handlers_and_be_signalled() -> None:
        set_handlers()
        os.kill(os.getpid(), signal.SIGTERM)

    heard = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", set_handlers_and_be_signalled)
    read_all(Numbered(2))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == heard


_LEAVES_WORKERS = """
import sys
from tests.data.test_loader import Numbered, CPU
from spt_dist.data.batches import GlobalBatches
from spt_dist.data.loader import load_batches
left = load_batches(Numbered(2), GlobalBatches(23, 4).epoch(), CPU)
next(left)
print("read", flush=True)
sys.modules["kept"] = left  # beyond the end of the program
"""


def test_a_program_ends_with_workers_left_behind() -> None:
    ended = subprocess.run([sys.executable, "-c", _LEAVES_WORKERS], timeout=200, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "read\n"), ended.stderr


_HAS_A_STUCK_WORKER = """
import multiprocessing, os, sys
from threading import Thread
from tests.data.shards.shards_for_tests import open_set
from tests.data.test_loader import CPU
from spt_dist.data.batches import GlobalBatches
from spt_dist.data.loader import load_batches, order_of
folder, location, then = sys.argv[1:]

def on_input():
    os.read(0, 1)  # not by sys.stdin, whose lock a worker would wait for
    exec(then)

samples = open_set(folder, num_workers=1)
samples._location = location
Thread(target=on_input, daemon=True).start()
next(load_batches(samples, GlobalBatches(len(samples), 4, order=order_of(samples)).epoch(), CPU))
"""


@pytest.mark.parametrize("then", ["os._exit(1)", "multiprocessing.active_children()[0].terminate()"])
@pytest.mark.parametrize("command", ["curl", "sleep"])
def test_a_worker_ends_with_its_rank_in_the_midst_of_a_read(tmp_path: Path, command: str, then: str) -> None:
    write_shards(tmp_path, [9])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        location = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if command == "sleep":
            location = "pipe:(sleep 1000; echo {}); true"
        arguments = [sys.executable, "-c", _HAS_A_STUCK_WORKER, str(tmp_path), location, then]
        rank = subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            children = children_once_there_is(command, psutil.Process(rank.pid))
            assert len(children) >= 2 and all(is_alive(each) for each in children)
            rank.communicate(b"\n", timeout=60)
            deadline = time.monotonic() + 60
            while (left := [each for each in children if is_alive(each)]) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not left
        finally:
            rank.kill()
            rank.wait()


def children_once_there_is(command: str, process: psutil.Process) -> list[psutil.Process]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        children = process.children(recursive=True)
        if command in map(name_of, children):
            return children
        time.sleep(0.1)
    raise AssertionError(f"{command} has not been started")


def name_of(process: psutil.Process) -> str:
    """ "" for one that has ended: while a rank imports what it needs, it starts commands that end at once."""
    try:
        return process.name() if is_alive(process) else ""
    except psutil.NoSuchProcess:
        return ""


def is_alive(process: psutil.Process) -> bool:
    """Not so one that has ended, which nobody has asked for its status."""
    try:
        # Another process may have its id by now.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
