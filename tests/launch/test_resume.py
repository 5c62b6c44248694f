"""Runs that are killed and started again: the same curve as an uninterrupted run."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch.processes import Launch, RunningScript, ScriptResult, run_all, run_script
from tests.launch.runs import (
    STEPS_PER_EPOCH,
    checkpoint_path,
    latest_step,
    read_lines,
    read_losses,
    read_summary,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 20
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
# In the middle of an epoch, so that steps after the last checkpoint are done again.
KILL_AT = 5 * STEPS_PER_EPOCH + 2
SHORT_EPOCHS = 8
RESUME_AT = 2 * STEPS_PER_EPOCH


def kill_everything(running: RunningScript) -> ScriptResult:
    """SIGKILL to every process of the launch, as a power cut would."""
    running.kill()
    return running.wait(10)


def kill_rank_one(running: RunningScript) -> ScriptResult:
    """SIGKILL to rank 1 alone; the others and the launcher must not wait for it for ever."""
    (pid,) = running.processes("RANK=1")
    os.kill(pid, signal.SIGKILL)
    return running.wait(120)


@pytest.mark.parametrize(
    ("launcher", "ranks", "kill"),
    [
        pytest.param("python", 1, kill_everything, id="one process"),
        pytest.param("torchrun", 2, kill_rank_one, id="one of two ranks", marks=pytest.mark.distributed),
    ],
)
def test_killed_run_goes_on_bit_for_bit(
    tmp_path: Path, launcher: str, ranks: int, kill: Callable[[RunningScript], ScriptResult]
) -> None:
    """With dropout, whose draws after the resumption have to be those of the uninterrupted run."""
    reference, work_dir = tmp_path / "reference", tmp_path / "work"
    config = write_config(tmp_path / "tiny.py", EPOCHS, proj_drop_rate=0.1, drop_path_rate=0.1)
    uninterrupted = RunningScript(["train.py", config, "--work-dir", reference], launcher, ranks)
    running = RunningScript(["train.py", config, "--work-dir", work_dir], launcher, ranks)
    try:
        wait_for_step(running, work_dir, KILL_AT)
        killed = kill(running)
        uninterrupted.wait(180).check()
    finally:
        running.kill()
        uninterrupted.kill()
    assert killed.rc != 0
    done, saved = len(read_losses(work_dir)), latest_step(work_dir)
    assert KILL_AT <= done < NUM_STEPS
    assert 0 < saved <= done
    assert not (work_dir / "task.safetensors").exists()

    resumed = run_script(["train.py", config, "--work-dir", work_dir, "--resume"], launcher, ranks).check()
    assert f"after {saved} of {NUM_STEPS} steps" in " ".join(resumed.stdout.split())
    assert list(read_losses(work_dir)) == list(range(1, NUM_STEPS + 1))
    assert read_lines(work_dir) == read_lines(reference)
    assert read_summary(work_dir)["scores"]["top1"] == read_summary(reference)["scores"]["top1"]
    assert_same_bits(work_dir / "task.safetensors", reference / "task.safetensors")
    assert_same_bits(checkpoint_path(work_dir, NUM_STEPS), checkpoint_path(reference, NUM_STEPS))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of a finished run of one process under DDP without dropout, with all its checkpoints."""
    work_dir = tmp_path_factory.mktemp("alone") / "work"
    run_script(training(work_dir)).check()
    return work_dir


# Name -> options and ranks.
RESUMED: dict[str, tuple[list[str], int]] = {
    "ZeRO 0": (["engine.type=deepspeed", "engine.zero_stage=0"], 2),
    "ZeRO 2": (["engine.type=deepspeed", "engine.zero_stage=2"], 2),
    "ZeRO 3": (["engine.type=deepspeed", "engine.zero_stage=3"], 2),
    "FSDP": (["engine.type=fsdp"], 2),
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> dict[str, Path]:
    """Work dirs of runs that went on from an early checkpoint of ``alone``, in a copy of its work dir."""
    folder = tmp_path_factory.mktemp("resumed")
    work_dirs = {name: folder / str(number) / "work" for number, name in enumerate(RESUMED)}
    launches = {}
    for name, (options, ranks) in RESUMED.items():
        shutil.copytree(alone, work_dirs[name])
        arguments = training(work_dirs[name], *options, resume=checkpoint_path(work_dirs[name], RESUME_AT))
        launches[name] = Launch(arguments, "torchrun", ranks)
    for result in run_all(launches).values():
        result.check()
    return work_dirs


@pytest.mark.distributed
@pytest.mark.parametrize("case", RESUMED)
def test_other_engine_and_ranks_go_on(resumed: dict[str, Path], alone: Path, case: str) -> None:
    """The lines before the checkpoint stay; from there on the curve agrees but for rounding."""
    before, after = read_lines(alone), read_lines(resumed[case])
    assert [line for line in after if line["step"] <= RESUME_AT] == [
        line for line in before if line["step"] <= RESUME_AT
    ]
    assert after != before, "nothing was trained again"
    assert_close(resumed[case], alone, 0)


@pytest.mark.distributed
def test_back_to_one_rank(tmp_path: Path, resumed: dict[str, Path], alone: Path) -> None:
    """One rank under DDP, two under ZeRO 2, and one under DDP again, in a work dir of its own."""
    work_dir, step = tmp_path / "work", 5 * STEPS_PER_EPOCH
    run_script(training(work_dir, resume=checkpoint_path(resumed["ZeRO 2"], step))).check()
    assert_close(work_dir, alone, step)


def test_resumed_after_the_end(tmp_path: Path, alone: Path) -> None:
    """Nothing is left to train: the results stay what they are."""
    work_dir = tmp_path / "work"
    shutil.copytree(alone, work_dir)
    run_script([*training(work_dir), "--resume"]).check()
    assert read_lines(work_dir) == read_lines(alone)
    assert read_summary(work_dir)["scores"]["top1"] == read_summary(alone)["scores"]["top1"]
    assert_same_bits(work_dir / "task.safetensors", alone / "task.safetensors")


def wait_for_step(running: RunningScript, work_dir: Path, step: int, timeout: float = 120.0) -> None:
    """Poll until the run has recorded ``step`` steps; it must still be running then."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        alive = running.is_running()
        if len([line for line in read_lines(work_dir) if "loss" in line]) >= step:
            assert alive, "the run was over before it could be killed"
            return
        assert alive, f"the run ended early:\n{running.wait(1).stderr}"
        time.sleep(0.005)
    running.kill()
    raise AssertionError(f"no step {step} within {timeout} s:\n{running.wait(1).stderr}")


def training(work_dir: Path, *options: str, resume: Path | None = None) -> list[str | Path]:
    """Arguments of a short run without dropout that keeps all its checkpoints."""
    config = write_config(work_dir.parent / "tiny.py", SHORT_EPOCHS)
    going_on = [] if resume is None else ["--resume", resume]
    return [
        "train.py",
        config,
        "--work-dir",
        work_dir,
        *going_on,
        "--cfg-options",
        "train.keep_checkpoints=99",
        *options,
    ]


def assert_same_bits(found_path: Path, expected_path: Path) -> None:
    """Two safetensors files hold the same tensors."""
    found, expected = load_file(found_path), load_file(expected_path)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def assert_close(work_dir: Path, reference: Path, first_step: int) -> None:
    """Losses from ``first_step`` on, accuracy and task file agree but for rounding.

    Sums are taken in another order on other engines and numbers of ranks, and Adam carries that on.
    """
    expected = {step: loss for step, loss in read_losses(reference).items() if step > first_step}
    found = read_losses(work_dir)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    assert read_summary(work_dir)["scores"]["top1"] == pytest.approx(
        read_summary(reference)["scores"]["top1"], abs=2 / 1596
    )
    task, wanted = load_file(work_dir / "task.safetensors"), load_file(reference / "task.safetensors")
    assert task.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(
            task[name], values, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
