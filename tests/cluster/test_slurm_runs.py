"""Real runs as SLURM jobs: submitted, preempted, killed and put back; job arrays; the other scripts' jobs."""

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.cluster import Slurm
from tests.cluster.test_slurm_jobs import SCRIPTS, release, start_taking_nodes
from tests.launch.processes import ScriptResult, run_script, standing_still
from tests.launch.runs import (
    STEPS_PER_EPOCH,
    assert_same_task,
    latest_step,
    read_lines,
    read_losses,
    read_summary,
    write_config,
)
from tests.launch.test_resume import assert_same_bits

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 30
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
TWO_NODES = ("--nodes", "2", "--gpus-per-node", "0")
ONE_NODE = ("--gpus-per-node", "0")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is long enough to be stopped in its midst."""
    return write_config(tmp_path_factory.mktemp("my jobs") / "tiny.py", EPOCHS)


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    """Work dir of the run on one process."""
    work_dir = config.parent / "alone"
    run_script(["train.py", config, "--work-dir", work_dir]).check()
    return work_dir


@pytest.fixture(scope="module")
def together(config: Path) -> Path:
    """Work dir of the uninterrupted run on two ranks."""
    work_dir = config.parent / "together"
    run_script(["train.py", config, "--work-dir", work_dir], "torchrun", 2).check()
    return work_dir


def submit(slurm: Slurm, config: Path, options: Sequence[str | Path], passed: Sequence[str | Path]) -> ScriptResult:
    """Submit by launch/submit.py."""
    return slurm.run("head", ["python", "launch/submit.py", config, *options, "--", *passed]).check()


def job_of(submitted: ScriptResult, label: str = "job") -> int:
    """The id that launch/submit.py prints."""
    found = re.search(rf"^{label} +(\d+)$", submitted.stdout, re.MULTILINE)
    assert found is not None, submitted.stdout
    return int(found[1])


def wait_for_step(slurm: Slurm, job_id: int, work_dir: Path, step: int) -> None:
    """Wait until a checkpoint after ``step`` steps is there."""
    slurm.wait_until(job_id, lambda job: job["JobState"] != "PENDING")
    # Without a word to SLURM, which takes as long as many steps.
    end = time.monotonic() + 120
    while latest_step(work_dir) < step and time.monotonic() < end:
        time.sleep(0.01)
    assert slurm.state_of(job_id) == "RUNNING", slurm.log(slurm.job(job_id))


def go_on(slurm: Slurm, job_id: int) -> dict[str, str]:
    """Let a job that is put back start, and wait for its end: its fields."""
    slurm.wait_until(job_id, lambda job: (job["JobState"], job["Restarts"]) == ("PENDING", "1"), timeout=60)
    release(slurm, job_id)
    job = slurm.wait(job_id, 120)
    assert job["JobState"] == "COMPLETED", slurm.log(job)
    return job


def assert_same_run(work_dir: Path, reference: Path) -> None:
    """Curve, accuracy and task file are the same, bit for bit, and no step is there twice."""
    assert list(read_losses(work_dir)) == list(range(1, NUM_STEPS + 1))
    assert read_lines(work_dir) == read_lines(reference)
    assert_same_bits(work_dir / "task.safetensors", reference / "task.safetensors")


def test_a_preempted_run_is_the_uninterrupted_one(
    slurm: Slurm, config: Path, alone: Path, together: Path, tmp_path: Path
) -> None:
    work_dir = tmp_path / "the work"
    options = [*TWO_NODES, "--partition", "low", "--name", "my job", "--sbatch", "exclusive"]
    submitted = submit(slurm, config, options, ["--work-dir", work_dir])
    job_id = job_of(submitted)
    assert f"sbatch --parsable '{work_dir}/slurm/train.sbatch'" in submitted.stdout
    wait_for_step(slurm, job_id, work_dir, STEPS_PER_EPOCH)
    ranks = [pid for host in ("n1", "n2") for pid in slurm.ranks(host, work_dir)]
    assert len(ranks) == 2
    with standing_still(ranks):
        taken = start_taking_nodes(slurm)
        slurm.wait_until(job_id, lambda job: "asked to stop" in slurm.log(job), timeout=30)
    taken.wait().check()
    stopped = latest_step(work_dir)
    assert stopped < NUM_STEPS
    log = slurm.log(go_on(slurm, job_id))
    assert f"stopped by SIGUSR1 at step {stopped}; checkpoint saved" in log
    rank_log = (work_dir / "slurm" / str(job_id) / "rank-0.log").read_text()
    assert f"after {stopped} of {NUM_STEPS} steps" in " ".join(rank_log.split())
    assert f"{work_dir}/task.safetensors" in log, "the job's own log ends with what rank 0 said"
    assert_same_run(work_dir, together)
    assert_same_task(work_dir, alone)


def test_a_run_under_torchrun_whose_rank_is_killed_goes_on(
    slurm: Slurm, config: Path, together: Path, tmp_path: Path
) -> None:
    work_dir = tmp_path / "work"
    options = [*TWO_NODES, "--launcher", "torchrun"]
    job_id = job_of(submit(slurm, config, options, ["--work-dir", work_dir]))
    wait_for_step(slurm, job_id, work_dir, STEPS_PER_EPOCH)
    killed = [pid for host in ("n1", "n2") for pid in slurm.processes(host, "RANK=1", f"SLURM_JOB_ID={job_id}")]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    log = slurm.log(go_on(slurm, job_id))
    assert re.search(r"^rank-0: error: rank 1 ", log, re.MULTILINE), log
    assert "a checkpoint was saved since this start" in log
    assert_same_run(work_dir, together)


def test_an_array_trains_a_suite(slurm: Slurm, tmp_path: Path) -> None:
    """Its tasks write nothing below the suite's work dir but their own folders; the table has a job of its own."""
    for name in ("one", "two", "three"):
        write_config(tmp_path / f"{name}.py", epochs=2)
    suite = tmp_path / "all.py"
    suite.write_text('suite = dict(groups=dict(low=["one.py", "two.py"], high=["three.py"]))\ntrain = dict(lr=1e-2)\n')
    out = tmp_path / "the suite"
    options = [*ONE_NODE, "--job", "array", "--at-once", "2"]
    submitted = submit(slurm, suite, options, ["--work-dir", out])
    array, table = job_of(submitted), job_of(submitted, "job of the table")
    slurm.run("head", ["scontrol", "hold", str(table)]).check()
    described = (out / "suite.json").stat()
    for task in range(3):
        slurm.wait_until(array, lambda _, task=task: state_of_task(slurm, array, task) == "COMPLETED", 180)
    assert {path.name for path in out.iterdir()} == {"suite.json", "slurm", "one", "two", "three"}
    assert (out / "suite.json").stat() == described, "written once, by who submitted"
    slurm.run("head", ["scontrol", "release", str(table)]).check()
    ended = slurm.wait(table)
    assert ended["JobState"] == "COMPLETED"
    scores = [100 * read_summary(out / name)["scores"]["top1"] for name in ("one", "two", "three")]
    text = (out / "suite.txt").read_text()
    assert text.strip() in slurm.log(ended)
    group_mean = ((scores[0] + scores[1]) / 2 + scores[2]) / 2
    assert f"{group_mean:.1f}" in next(line for line in text.splitlines() if "group mean" in line)
    assert json.loads((out / "two" / "run.json").read_text())["config"]["train"]["lr"] == 1e-2, "as the suite says"


def state_of_task(slurm: Slurm, array: int, task: int) -> str:
    """State of a task of an array; "PENDING" while it has no record of its own."""
    shown = slurm.run("head", ["scontrol", "show", "job", "-o", f"{array}_{task}"]).stdout
    found = re.search(r"JobState=(\S+)", shown)
    return found[1] if found else "PENDING"


def test_scores_and_evaluation_as_jobs(slurm: Slurm, config: Path, alone: Path, tmp_path: Path) -> None:
    """By the scripts as they ship, which ask where the logs go."""
    out = tmp_path / "scores"
    (tmp_path / "sub").mkdir()
    task = tmp_path / "sub" / "task.safetensors"
    task.write_bytes((alone / "task.safetensors").read_bytes())
    log = f"--output={tmp_path}/%j.out"
    jobs = [
        slurm.sbatch(SCRIPTS / "sensitivity.sbatch", config, "--out", out, options=[log]),
        slurm.sbatch(SCRIPTS / "evaluate.sbatch", config, "--task", task, options=[log]),
    ]
    scored, evaluated = (slurm.wait(job, 180) for job in jobs)
    assert (scored["JobState"], evaluated["JobState"]) == ("COMPLETED", "COMPLETED"), slurm.log(scored)
    (mine,), (other,) = (list(folder.glob("*.safetensors")) for folder in (out, alone / "scores"))
    assert_same_bits(mine, other)
    assert (out / "slurm" / str(jobs[0]) / "rank-0.log").is_file()
    assert (task.parent / "slurm" / str(jobs[1]) / "rank-0.log").is_file()
    assert f"{read_summary(alone)['scores']['top1']:.2%}" in slurm.log(evaluated)
