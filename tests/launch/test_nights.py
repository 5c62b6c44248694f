"""What a night on a cluster brings: kills at any moment, signals, full disks, restarts by the launcher."""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.disks import mounted_disk
from tests.launch.processes import RunningScript, ScriptResult, run_script, standing_still, wait_until
from tests.launch.runs import (
    STEPS_PER_EPOCH,
    latest_step,
    read_lines,
    read_losses,
    read_summary,
    write_config,
)
from tests.launch.test_resume import assert_same_bits, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 10
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
OFTEN = ["--cfg-options", "train.checkpoint_steps=3", "train.save_best=True"]
FSDP = ["--engine", "fsdp"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout, whose draws after a resumption have to be those of the uninterrupted run."""
    return write_config(tmp_path_factory.mktemp("night") / "tiny.py", EPOCHS, proj_drop_rate=0.1, drop_path_rate=0.1)


@pytest.fixture(scope="module")
def reference(config: Path) -> Path:
    """Work dir of the uninterrupted run on two ranks under FSDP2."""
    work_dir = config.parent / "reference"
    run_script(["train.py", config, "--work-dir", work_dir, *FSDP, *OFTEN], "torchrun", 2).check()
    return work_dir


def assert_same_run(work_dir: Path, reference: Path) -> None:
    """Curve, accuracy and task files are the same, bit for bit."""
    assert list(read_losses(work_dir)) == list(range(1, NUM_STEPS + 1))
    assert read_lines(work_dir) == read_lines(reference)
    assert read_summary(work_dir)["scores"]["top1"] == read_summary(reference)["scores"]["top1"]
    for name in ("task.safetensors", "task_best.safetensors"):
        assert_same_bits(work_dir / name, reference / name)
    best = [(path / "checkpoints" / "best").read_text(encoding="utf-8") for path in (work_dir, reference)]
    assert best[0] == best[1]
    assert not list((work_dir / "checkpoints").glob(".*"))


def kill_in_the_middle_of_a_write(running: RunningScript, work_dir: Path, after: int) -> None:
    """SIGKILL while a checkpoint after step ``after`` is being written."""
    wait_until(lambda: latest_step(work_dir) > after or not running.is_running(), 120)
    writer = running.processes("RANK=0")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.is_running():
        if list((work_dir / "checkpoints").glob(".step-*")):
            # It is soon written: whether it was not yet whole can only be seen while nothing moves.
            with standing_still(writer):
                if list((work_dir / "checkpoints").glob(".step-*")):
                    running.kill()
                    running.wait(10)
                    return
    raise AssertionError(f"the run was over before it could be killed: {running.wait(1).stderr}")


@pytest.mark.distributed
def test_killed_at_any_step_and_in_the_middle_of_a_write(config: Path, reference: Path, tmp_path: Path) -> None:
    draw = random.Random(time.time_ns())
    steps = sorted(draw.sample(range(4, NUM_STEPS - 20), 2))
    work_dir = tmp_path / "work"
    command: list[str | Path] = ["train.py", config, "--work-dir", work_dir, *FSDP, "--resume", *OFTEN]
    for step in steps:
        running = RunningScript(command, "torchrun", 2)
        try:
            wait_for_step(running, work_dir, step)
        finally:
            running.kill()
        running.wait(10)
        assert 0 < latest_step(work_dir) < NUM_STEPS, steps
    running = RunningScript(command, "torchrun", 2)
    try:
        kill_in_the_middle_of_a_write(running, work_dir, latest_step(work_dir))
    finally:
        running.kill()
    assert list((work_dir / "checkpoints").glob(".step-*"))
    run_script(command, "torchrun", 2).check()
    assert_same_run(work_dir, reference)


def stop_all(running: RunningScript) -> None:
    """SIGUSR1 to every rank, as SLURM sends it before the time limit."""
    for rank in (0, 1):
        for pid in running.processes(f"RANK={rank}"):
            os.kill(pid, signal.SIGUSR1)


def stop_rank_one(running: RunningScript) -> None:
    """SIGTERM to one rank alone."""
    (pid,) = running.processes("RANK=1")
    os.kill(pid, signal.SIGTERM)


@pytest.mark.distributed
@pytest.mark.parametrize("stop", [stop_all, stop_rank_one])
def test_signals_end_in_a_checkpoint(
    config: Path, reference: Path, tmp_path: Path, stop: Callable[[RunningScript], None]
) -> None:
    """And no step is done twice."""
    work_dir = tmp_path / "work"
    command: list[str | Path] = ["train.py", config, "--work-dir", work_dir, *FSDP, "--resume", *OFTEN]
    running = RunningScript(command, "deepspeed", 2)
    try:
        wait_for_step(running, work_dir, 2 * STEPS_PER_EPOCH + 2)
        stop(running)
        stopped = running.wait(120)
    finally:
        running.kill()
    assert stopped.rc == 75, stopped.stderr
    said = re.findall(r"^stopped by .* at step (\d+); checkpoint saved", stopped.stderr, re.MULTILINE)
    assert said == [str(latest_step(work_dir))]
    assert len(read_losses(work_dir)) == latest_step(work_dir) < NUM_STEPS
    run_script(command, "deepspeed", 2).check()
    assert_same_run(work_dir, reference)


@pytest.mark.distributed
def test_torchrun_restarts_and_goes_on(config: Path, reference: Path, tmp_path: Path) -> None:
    """Killed ranks come back by themselves, from the last checkpoint."""
    work_dir = tmp_path / "work"
    command: list[str | Path] = ["train.py", config, "--work-dir", work_dir, *FSDP, "--resume", *OFTEN]
    running = RunningScript(command, "torchrun", 2, launcher_options=["--max-restarts", "2"])
    try:
        for step in (STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH):
            wait_for_step(running, work_dir, step)
            victims = running.processes("RANK=1")
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda victims=victims: new_rank(running, victims), 120)
        running.wait(180).check()
    finally:
        running.kill()
    assert_same_run(work_dir, reference)


def new_rank(running: RunningScript, old: list[int]) -> bool:
    """Whether a rank 1 runs that is not one of the old."""
    return bool(set(running.processes("RANK=1")) - set(old))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 640 KiB."""
    with mounted_disk(tmp_path / "disk", "640k") as folder:
        yield folder


def test_a_full_disk_costs_no_run(config: Path, small_disk: Path) -> None:
    """Training goes on while the disk is full, says so, and resumes from the last good checkpoint where it ends."""
    work_dir = small_disk / "work"
    # A single process is quick: so long that it is not over before a test that was held up looks again.
    epochs = 4 * EPOCHS
    num_steps = epochs * STEPS_PER_EPOCH
    often = [*OFTEN, f"train.epochs={epochs}"]
    running = RunningScript(["train.py", config, "--work-dir", work_dir, *often], "python", 1)
    try:
        wait_for_step(running, work_dir, 2 * STEPS_PER_EPOCH)
        good = fill_between_checkpoints(running, small_disk)
        result = running.wait(120)
    finally:
        running.kill()
    said = " ".join(result.stdout.split())
    assert "can't be written" in said and "the last good one stays" in said, result.stderr
    assert result.rc != 0, "the task file can't be written"
    assert "No space left" in result.stderr
    saved = latest_step(work_dir)
    assert good <= saved < num_steps
    (small_disk / "filler").unlink()
    (small_disk / "filler.more").unlink()
    resumed = run_script(["train.py", config, "--work-dir", work_dir, "--resume", *often])
    assert f"after {saved} of {num_steps} steps" in " ".join(resumed.check().stdout.split())
    assert list(read_losses(work_dir)) == list(range(1, num_steps + 1))


def fill_between_checkpoints(running: RunningScript, disk: Path) -> int:
    """Fill the disk at a moment at which nothing is under way that will give room back; the latest step saved by then.

    A checkpoint that is just being written would take the place of an older one, and so would each after it.
    """
    work_dir = disk / "work"
    while True:
        with standing_still(running.processes()):
            assert running.is_running(), "the run was over before the disk was full"
            checkpoints = work_dir / "checkpoints"
            # As many as are kept, and the best.
            pointers = (checkpoints / "latest", checkpoints / "best")
            kept = {path.read_text(encoding="utf-8") for path in pointers if path.is_file()}
            found = sorted(path.name for path in checkpoints.glob("step-*"))
            if set(found) == kept | set(found[-2:]) and not list(work_dir.rglob(".*")):
                fill(disk / "filler")
                return latest_step(work_dir)
        time.sleep(0.005)


def fill(path: Path) -> None:
    """Write until the disk is full, in two sizes, so that nothing fits any more."""
    for name, size in ((path, 4096), (path.with_suffix(".more"), 1)):
        with open(name, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_a_hung_rank_ends_the_job(config: Path, tmp_path: Path) -> None:
    """Within the config's timeout, with a line that names the rank and the step."""
    work_dir = tmp_path / "work"
    options = ["--cfg-options", "engine.timeout=8"]
    running = RunningScript(["train.py", config, "--work-dir", work_dir, *options], "deepspeed", 2)
    try:
        wait_for_step(running, work_dir, STEPS_PER_EPOCH)
        (pid,) = running.processes("RANK=1")
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        result: ScriptResult = running.wait(150)
    finally:
        running.kill()
    # The launcher waits half a minute before it kills a rank that does not end; gloo would wait half an hour.
    assert time.monotonic() - started < 120
    assert result.rc != 0
    assert re.search(r"^error: rank 1 .*step \d+", result.stderr, re.MULTILINE), result.stderr
