"""Speed, waiting and memory of a run, against sums over single steps with a clock of the test's own."""

import logging
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spt_dist.training.metrics import read_metrics
from spt_dist.training.monitor import Monitor, peak_memory
from tests.ranks import run_ranks
from tests.training.configs_for_tests import make_config, read_curves

CPU = torch.device("cpu")
STEPS_PER_EPOCH, EPOCHS, INTERVAL = 5, 3, 4
LAST = STEPS_PER_EPOCH * EPOCHS
# Where points are due: each fourth step, and the epochs' ends.
POINTS = [4, 5, 8, 10, 12, 15]


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Clock:
    """A clock that goes on only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_of(step: int, rank: int) -> float:
    """Seconds for which a rank waits for the data of a step; rank 1 waits longer but in the second epoch."""
    longer = (5 < step <= 10) == (rank == 0)
    return (2 if longer else 1) * step / 64


def compute_of(step: int) -> float:
    """Seconds that a step takes besides; the first ones take long."""
    return 20.0 if step <= 3 else 1 + (step % 3) / 4


def samples_of(step: int) -> int:
    """Size of the global batch: the last of an epoch is smaller."""
    return (24 if step % STEPS_PER_EPOCH == 0 else 64) * (10 if step > 10 else 1)


def expected(first: int, last: int, rank: int = 0) -> tuple[float, float]:
    """Samples a second and share of waiting over the steps from ``first`` to ``last``."""
    steps = range(first, last + 1)
    waited = sum(wait_of(step, rank) for step in steps)
    seconds = waited + sum(compute_of(step) for step in steps)
    return sum(samples_of(step) for step in steps) / seconds, waited / seconds


@contextmanager
def logged() -> Iterator[list[str]]:
    """What the monitor logs in the block, from INFO on."""
    messages: list[str] = []
    logger = logging.getLogger("spt_dist.training.monitor")

    def collect(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return True

    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(collect)
    yield messages
    logger.removeFilter(collect)
    logger.setLevel(level)


def train(folder: str, first: int = 1, last: int = LAST, interval: int = INTERVAL, loss: float = 1.0) -> Any:
    """Steps ``first`` to ``last`` of a run as a trainer would report them; ends where an epoch may be under way."""
    rank, clock = dist.get_rank(), Clock()

    def batches(steps: list[int]) -> Any:
        for step in steps:
            clock.now += wait_of(step, rank)
            yield step

    ballast = []
    config = make_config(folder, epochs=EPOCHS, interval=interval)
    with logged() as messages, Monitor(config, CPU, first - 1, clock) as monitor:
        for epoch in range((first - 1) // STEPS_PER_EPOCH, EPOCHS):
            end = min(last, (epoch + 1) * STEPS_PER_EPOCH)
            start = max(first, epoch * STEPS_PER_EPOCH + 1)
            for step in monitor.timed(batches(list(range(start, end + 1)))):
                clock.now += compute_of(step)
                tensor = torch.tensor(loss / step) if step % 2 else loss / step
                monitor.step(step=step, loss=tensor, lr=step / 8, grad_norm=tensor, num_samples=samples_of(step))
                # Evaluation and checkpoints, which are no training.
                clock.now += 1000.0
            if end % STEPS_PER_EPOCH:
                break
            if epoch == 1:
                if rank == 1:
                    ballast.append(torch.ones(2**27))
                monitor.evaluation(end, top1=0.5, recall=0.25)
                monitor.saved(end, Path(folder, "checkpoint-10"), 0.5, 3 * 2**20)
            monitor.epoch_end(epoch)
    return asdict(monitor.summary()), messages, peak_memory(CPU)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_curves_speed_file_summary_and_lines(world_size: int, tmp_path: Path) -> None:
    results = run_ranks(train, world_size, str(tmp_path))
    curves = read_curves(tmp_path / "logs")
    firsts = [1] + [point + 1 for point in POINTS]
    spans = [expected(first, last) for first, last in zip(firsts, POINTS, strict=False)]
    assert list(curves["speed/samples_per_second"]) == list(curves["speed/data_wait"]) == POINTS
    assert list(curves["speed/samples_per_second"].values()) == pytest.approx([speed for speed, _ in spans])
    assert list(curves["speed/data_wait"].values()) == pytest.approx([share for _, share in spans])
    assert curves["train/loss"] == curves["train/grad_norm"] == pytest.approx({step: 1 / step for step in POINTS})
    assert curves["train/lr"] == {step: step / 8 for step in POINTS}
    assert curves["val/top1"] == {10: 0.5}
    assert curves["val/recall"] == {10: 0.25}
    assert curves["checkpoint/seconds"] == {10: 0.5}
    assert curves["checkpoint/mib"] == {10: 3.0}
    lines = read_metrics(tmp_path / "speed.jsonl")
    assert [line["step"] for line in lines] == POINTS
    assert [(line["samples_per_second"], line["data_wait"]) for line in lines] == [
        pytest.approx(span) for span in spans
    ]
    assert sum(line["seconds"] for line in lines) == pytest.approx(
        sum(wait_of(step, 0) + compute_of(step) for step in range(1, LAST + 1))
    )
    memory = [curves[f"memory/rank_{rank}_gib"] for rank in range(world_size)]
    assert [list(points) for points in memory] == [[5, 10, 15]] * world_size
    assert f"memory/rank_{world_size}_gib" not in curves

    for rank, (summary, messages, peak) in enumerate(results):
        # The summary leaves out the first interval, with its slow steps.
        assert summary["samples_per_second"] == pytest.approx(expected(5, LAST, rank)[0])
        assert summary["data_wait"] == pytest.approx(max(expected(5, LAST, rank)[1] for rank in range(world_size)))
        assert summary["peak_memory_gib"] == pytest.approx([points[15] for points in memory])
        assert summary["peak_memory_gib"][rank] == pytest.approx(peak / 2**30, rel=0.02)
        check_messages(messages, rank, world_size, memory, tmp_path)
    if world_size == 2:
        # The tensor of half a GiB that rank 1 made in its second epoch.
        assert 0.45 < memory[1][10] - memory[1][5] < 0.6
        assert memory[0][15] - memory[0][5] < 0.1


def check_messages(
    messages: list[str], rank: int, world_size: int, memory: list[dict[int, float]], folder: Path
) -> None:
    """Compare the lines of a rank's log with what they have to say."""
    assert messages.pop(1) == f"saved {folder / 'checkpoint-10'} (3.0 MiB in 0.5 s)"
    for epoch, message in enumerate(messages):
        first, last = epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH
        waits = [expected(first, last, other)[1] for other in range(world_size)]
        peaks = [points[last] for points in memory]
        waiting, largest = (f" (rank {values.index(max(values))})" * (world_size > 1) for values in (waits, peaks))
        assert message == (
            f"epoch {epoch + 1} of 3: loss {1 / last:.4f}{', top-1 50.00 %, recall 25.00 %' * (epoch == 1)}, "
            f"{expected(first, last, rank)[0]:.{int(epoch < 2)}f} samples/s, "
            f"{100 * max(waits):.1f} % waiting for data{waiting}, peak memory {max(peaks):.2f} GiB{largest}"
        )
    assert len(messages) == EPOCHS


def test_a_resumed_run_continues_its_curves(alone: None, tmp_path: Path) -> None:
    train(str(tmp_path), 1, 8, interval=1, loss=1.0)
    time.sleep(1)  # TensorBoard's files are ordered by the second
    # The checkpoint was of step 6; points now come at other steps.
    summary, _, _ = train(str(tmp_path), 7, LAST, interval=4, loss=2.0)
    curves = read_curves(tmp_path / "logs")
    wanted = {step: 1 / step for step in range(1, 7)} | {step: 2 / step for step in (8, 10, 12, 15)}
    assert curves["train/loss"] == pytest.approx(wanted)
    lines = read_metrics(tmp_path / "speed.jsonl")
    assert [line["step"] for line in lines] == list(wanted)
    speeds = list(curves["speed/samples_per_second"].values())
    assert [line["samples_per_second"] for line in lines] == pytest.approx(speeds)
    # Steps 7 and 8 are the first interval after the start.
    assert summary["samples_per_second"] == pytest.approx(expected(9, LAST)[0])


def test_runs_too_short_to_leave_anything_out(alone: None, tmp_path: Path) -> None:
    short, _, _ = train(str(tmp_path / "short"), 11, LAST, interval=100)
    assert (short["samples_per_second"], short["data_wait"]) == pytest.approx(expected(11, LAST))
    with Monitor(make_config(tmp_path / "none"), CPU, LAST, Clock()) as monitor:
        none = asdict(monitor.summary())
    assert none == {"samples_per_second": None, "data_wait": None, "peak_memory_gib": []}


def train_without_backends(folder: str) -> None:
    with Monitor(make_config(folder, backends=[], interval=10), CPU) as monitor:
        for epoch in range(4):
            pairs = zip(range(0, 50, 2), range(1, 50, 2), strict=True)
            for index, pair in enumerate(monitor.timed(pairs)):
                assert pair == (2 * index, 2 * index + 1)
                monitor.step(step=epoch * 25 + index + 1, loss=0.0, lr=0.0, grad_norm=0.0, num_samples=1)
            monitor.epoch_end(epoch)


@pytest.mark.distributed
def test_files_stay_small_and_without_backends_there_is_no_folder(tmp_path: Path) -> None:
    run_ranks(train_without_backends, 2, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["speed.jsonl"]
    content = (tmp_path / "speed.jsonl").read_text()
    # Ten intervals, and two epochs that end within one.
    assert len(content.splitlines()) == 12
    assert len(content) < 12 * 200


def test_a_step_may_take_several_batches(alone: None, tmp_path: Path) -> None:
    clock = Clock()

    def batches() -> Any:
        for wait in (1.0, 2.0, 4.0, 8.0):
            clock.now += wait
            yield wait
        clock.now += 1000.0

    with Monitor(make_config(tmp_path, backends=[], interval=1), CPU, clock=clock) as monitor:
        for number, _ in enumerate(monitor.timed(batches()), 1):
            clock.now += 16.0
            if number % 2 == 0:
                monitor.step(step=number // 2, loss=0.0, lr=0.0, grad_norm=0.0, num_samples=10)
    lines = read_metrics(tmp_path / "speed.jsonl")
    assert [line["seconds"] for line in lines] == [35.0, 44.0]
    assert [line["data_wait"] for line in lines] == [3 / 35, 12 / 44]


def test_an_exception_passes_and_files_are_closed(alone: None, tmp_path: Path) -> None:
    others = set(threading.enumerate())

    def still_open() -> set[str]:
        paths = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
        writers = {type(thread).__name__ for thread in set(threading.enumerate()) - others} & {"_AsyncWriterThread"}
        return {Path(path).name for path in paths if path.startswith(str(tmp_path))} | writers

    # An iterable's own exception passes, too.
    batches = (1 // (3 - number) for number in (1, 2, 3))
    with pytest.raises(ZeroDivisionError), Monitor(make_config(tmp_path, interval=1), CPU) as monitor:
        for step, _ in enumerate(monitor.timed(batches), 1):
            monitor.step(step=step, loss=0.5, lr=0.0, grad_norm=0.0, num_samples=1)
            assert still_open() == {"speed.jsonl", "_AsyncWriterThread"}
    assert still_open() == set()
    assert read_curves(tmp_path / "logs")["train/loss"] == {1: 0.5, 2: 0.5}


def test_real_clock(alone: None, tmp_path: Path) -> None:
    # Of each step: before and after the monitor asks for its data, when these are there, before and after it is told.
    times: list[list[float]] = []

    def batches() -> Any:
        for step in range(1, 11):
            times[-1].append(time.perf_counter())
            time.sleep(0.02)
            times[-1].append(time.perf_counter())
            yield step

    with Monitor(make_config(tmp_path, backends=[], interval=5), CPU) as monitor:
        times.append([time.perf_counter()])
        for step in monitor.timed(batches()):
            times[-1].append(time.perf_counter())
            time.sleep(0.06)
            times[-1].append(time.perf_counter())
            monitor.step(step=step, loss=0.0, lr=0.0, grad_norm=0.0, num_samples=8)
            times[-1].append(time.perf_counter())
            times.append([time.perf_counter()])
        monitor.epoch_end(0)
    summary = monitor.summary()
    assert summary.samples_per_second is not None and summary.data_wait is not None
    # On a busy machine a sleep may last for long, and so may what is between two looks at a clock.
    steady = times[5:10]
    shortest_wait, longest_wait = (sum(step[end] - step[start] for step in steady) for start, end in ((1, 2), (0, 3)))
    shortest, longest = (sum(step[end] - step[start] for step in steady) for start, end in ((1, 4), (0, 5)))
    assert 5 * 8 / longest <= summary.samples_per_second <= 5 * 8 / shortest <= 8 / 0.08
    assert shortest_wait / longest <= summary.data_wait <= longest_wait / shortest


def test_peak_memory_is_the_most_that_was_touched() -> None:
    # Of a map of its own, since what malloc hands out may have been resident before, and may stay so.
    with mmap.mmap(-1, 2**29) as block:
        for _ in range(2**9):
            block.write(bytes(2**20))
    status = Path("/proc/self/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident is not None
    # The block has gone back to the system, but it was there.
    assert peak_memory(CPU) >= int(resident[1]) * 1024 + 2**28


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_counts_from_the_start_of_training(alone: None, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    torch.ones(2**28, device=device)
    with Monitor(make_config(tmp_path, backends=[]), device):
        torch.ones(2**24, device=device)
        assert peak_memory(device) - before == 2**26
