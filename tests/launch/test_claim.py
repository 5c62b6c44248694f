"""Two runs in one work dir: the second is refused while the first is at work, and only then."""

import time
from pathlib import Path

import pytest

from tests.launch.processes import RunningScript, run_script
from tests.launch.runs import checkpoint_path, latest_step, read_losses, write_config
from tests.launch.test_resume import wait_for_step

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_work_dir_is_one_run_s_until_that_ends(tmp_path: Path) -> None:
    config, work_dir = write_config(tmp_path / "tiny.py", epochs=3000), tmp_path / "run"
    short = write_config(tmp_path / "short.py", epochs=2)
    arguments = ["train.py", config, "--work-dir", work_dir]
    first = RunningScript([*arguments, "--cfg-options", "train.checkpoint_steps=5"], "torchrun", 2)
    try:
        wait_for_step(first, work_dir, 10)
        steps = len(read_losses(work_dir))
        for options in ([], ["--resume", "--cfg-options", "engine.timeout=4"]):
            second = run_script(["train.py", short, "--work-dir", work_dir, *options])
            assert second.rc == 2
            assert f"{work_dir}: another run is at work there (process " in second.error_lines[0]
        assert first.is_running() and not (work_dir / "previous").exists()
        wait_for_step(first, work_dir, steps + 5)
    finally:
        # As by a power cut: what it leaves keeps nobody out.
        first.kill()
    assert (work_dir / "running").exists() and latest_step(work_dir) > 0
    run_script(["train.py", short, "--work-dir", work_dir]).check()
    assert not (work_dir / "running").exists() and (work_dir / "previous").is_dir()


def test_a_run_that_goes_on_waits_for_the_one_before_to_end(tmp_path: Path) -> None:
    """As a job that SLURM has started again elsewhere, while the ranks that were cut off don't know yet."""
    config, work_dir = write_config(tmp_path / "tiny.py", epochs=3000), tmp_path / "run"
    arguments = ["train.py", config, "--work-dir", work_dir, "--resume", "--cfg-options", "train.checkpoint_steps=5"]
    first = RunningScript(arguments, "python", 1)
    try:
        wait_for_step(first, work_dir, 10)
        second = RunningScript(arguments, "torchrun", 2)
        try:
            for _ in range(25):
                time.sleep(1)
                assert second.is_running(), second.wait(10).stderr
            assert first.is_running()
            first.kill()
            step = latest_step(work_dir)
            wait_for_step(second, work_dir, len(read_losses(work_dir)) + 20)
        finally:
            second.kill()
        # It went on from the last checkpoint there was, not from the one that there was when it was started.
        said = second.wait(10)
        assert f"resumed from {checkpoint_path(work_dir, step)} " in said.stdout + said.stderr
    finally:
        first.kill()
    losses = read_losses(work_dir)
    assert list(losses) == list(range(1, len(losses) + 1))
