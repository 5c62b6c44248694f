"""One config under every launcher, on two hosts: the run of a single process."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spt_dist.exits import DONE, STOPPED, USER_ERROR
from tests.cluster.cluster import Cluster, Slurm
from tests.cluster.starting import WAYS, Alone, srun, torchrun, train
from tests.launch.processes import ROOT, ScriptResult, wait_until
from tests.launch.runs import (
    STEPS_PER_EPOCH,
    assert_same_curve,
    assert_same_plan,
    assert_same_task,
    latest_step,
    read_losses,
    read_summary,
)
from tests.launch.test_resume import wait_for_step

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 240.0


@dataclass(frozen=True)
class Finished:
    """A run under a launcher."""

    way: str
    ranks: int
    work_dir: Path
    result: ScriptResult


@pytest.fixture(scope="module", params=WAYS)
def finished(request: pytest.FixtureRequest, slurm: Slurm, alone: Alone) -> Finished:
    """The config's run under one of the launchers."""
    run, ranks = WAYS[request.param]
    work_dir = alone.work_dir.with_name("run-" + request.param.replace(" ", "-"))
    return Finished(request.param, ranks, work_dir, run(slurm, train(alone.config, work_dir), SECONDS).check())


def test_same_run_as_alone(finished: Finished, alone: Alone) -> None:
    assert_same_plan(finished.work_dir, alone.work_dir)
    assert_same_curve(finished.work_dir, alone.work_dir)
    assert_same_task(finished.work_dir, alone.work_dir)


def test_every_rank_is_one_of_them(finished: Finished) -> None:
    """The job's ranks are ranks of one run, of which one writes and reports."""
    scores = list((finished.work_dir / "scores").glob("*.safetensors"))
    assert len(scores) == finished.ranks
    assert all(f"of-{finished.ranks:05d}" in path.name for path in scores)
    assert finished.result.stdout.count(f"{finished.work_dir}/task.safetensors") == 1
    assert not list(finished.work_dir.rglob(".*")), "temporary files are left"


def test_nothing_is_left(finished: Finished, slurm: Slurm) -> None:
    slurm.wait_for_nodes()
    # What served the command on the other host, as sshd does, ends after it.
    wait_until(lambda: slurm.left() == [])


def test_forgotten_srun_is_said(finished: Finished) -> None:
    """In a batch job of four tasks; nowhere else."""
    said = "runs alone" in " ".join(finished.result.stdout.split())
    assert said == (finished.way == "python in a batch job")


def test_variables_of_another_launch_are_refused(slurm: Slurm, alone: Alone) -> None:
    """RANK and WORLD_SIZE as a shell may still have them from an experiment by hand: each task would be rank 0."""
    exported = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    work_dir = alone.work_dir.with_name("refused")
    script = train(alone.config, work_dir)
    result = slurm.run("head", ["srun", "-N2", "-n2", "python", *script], SECONDS, exported)
    assert result.rc == USER_ERROR
    wrong = "environment: RANK=0 and WORLD_SIZE=1 are set, but srun says SLURM_PROCID=1 and SLURM_STEP_NUM_TASKS=2"
    assert any(wrong in line for line in result.error_lines), result.stderr
    assert all("unset RANK" in line for line in result.error_lines)
    assert not work_dir.exists()


@contextlib.contextmanager
def own_name_is_loopback(cluster: Cluster) -> Iterator[None]:
    """Debian's installer gives a host's own name the address 127.0.1.1."""
    hosts = ("n1", "n2")
    try:
        for host in hosts:
            path = cluster.state / f"etc_hosts.{host}"
            others = [
                line
                for line in (cluster.state / "etc_hosts").read_text(encoding="ascii").splitlines()
                if line.split()[1] != host
            ]
            path.write_text("\n".join([*others, f"127.0.1.1 {host}", ""]), encoding="ascii")
            cluster.run(host, ["mount", "--bind", path, "/etc/hosts"]).check()
        yield
    finally:
        for host in hosts:
            # Lazily: a daemon may just be looking a name up.
            cluster.run(host, ["umount", "-l", "/etc/hosts"]).check()


def test_own_name_may_be_loopback(slurm: Slurm, alone: Alone) -> None:
    """Ranks that tell each other their own names' addresses would never meet."""
    work_dirs = [alone.work_dir.with_name(name) for name in ("loopback-srun", "loopback-torchrun")]
    with own_name_is_loopback(slurm):
        started = srun(slurm, train(alone.config, work_dirs[0]), SECONDS)
        started += torchrun(slurm, train(alone.config, work_dirs[1]), SECONDS)
        for running in started:
            running.wait().check()
    for work_dir in work_dirs:
        assert_same_curve(work_dir, alone.work_dir)


def test_work_dir_local_to_each_node(slurm: Slurm, alone: Alone, local_disk: Path) -> None:
    """Stopped, resumed and evaluated where the nodes share no work dir; rank 0's node has all of it."""
    work_dir = local_disk / "work"
    first, second = (slurm.path(host, work_dir) for host in ("n1", "n2"))
    (running,) = srun(slurm, train(alone.config, work_dir, "--resume"), SECONDS)
    wait_for_step(running, first, STEPS_PER_EPOCH + 2)
    (pid,) = slurm.ranks("n2", work_dir)
    os.kill(pid, signal.SIGUSR1)
    stopped = running.wait()
    assert stopped.rc == STOPPED, stopped.stderr
    steps = latest_step(first)
    assert len(read_losses(first)) == steps >= STEPS_PER_EPOCH + 2

    (running,) = srun(slurm, train(alone.config, work_dir, "--resume"), SECONDS)
    assert running.wait().check().rc == DONE
    assert list(read_losses(first)) == list(range(1, 1 + len(read_losses(alone.work_dir))))
    assert_same_plan(first, alone.work_dir)
    assert_same_curve(first, alone.work_dir)
    assert_same_task(first, alone.work_dir)
    assert len(list((first / "scores").glob("*.safetensors"))) == 2

    task = work_dir / "task.safetensors"
    (running,) = srun(slurm, [ROOT / "launch" / "evaluate.py", alone.config, "--task", task], SECONDS)
    assert f"{read_summary(first)['scores']['top1']:.2%}" in running.wait().check().stdout
    assert files(second) == []


def files(folder: Path) -> list[str]:
    """Relative paths of the files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
