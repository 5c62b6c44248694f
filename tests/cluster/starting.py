"""How each launcher is told to start a script on n1 and n2."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.cluster import RunningCommand, Slurm
from tests.launch.processes import ROOT, ScriptResult

Script = Sequence[str | Path]
# What a start by hand gives each rank.
BY_HAND_PORT = 29712


@dataclass(frozen=True)
class Alone:
    """A config, and the work dir of its run on a single process."""

    config: Path
    work_dir: Path


def train(config: Path, work_dir: Path, *options: str) -> list[str | Path]:
    """``launch/train.py`` and its arguments."""
    return [ROOT / "launch" / "train.py", config, "--work-dir", work_dir, *options]


def srun(cluster: Slurm, script: Script, timeout: float, tasks: int = 1) -> list[RunningCommand]:
    """Bare ``srun`` from head, with so many tasks a node."""
    return [cluster.start("head", ["srun", "-N2", f"--ntasks-per-node={tasks}", "python", *script], timeout)]


def deepspeed(cluster: Slurm, script: Script, timeout: float) -> list[RunningCommand]:
    """``deepspeed --hostfile`` from n1, which goes by pdsh and ssh, with an environment file where it is started."""
    folder = cluster.state / "started"
    folder.mkdir(exist_ok=True)
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n", encoding="ascii")
    return [cluster.start("n1", ["deepspeed", "--hostfile", cluster.hostfile(), *script], timeout, cwd=folder)]


def torchrun(cluster: Slurm, script: Script, timeout: float, *options: str) -> list[RunningCommand]:
    """``torchrun`` on each of the two; the one on n1 has the store."""
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29511", "--rdzv-id=1"]
    return [cluster.start(host, ["torchrun", *meeting, *options, *script], timeout) for host in ("n1", "n2")]


def mpirun(cluster: Slurm, script: Script, timeout: float) -> list[RunningCommand]:
    """``mpirun`` from n1 with a hostfile."""
    passed_on = [word for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") for word in ("-x", name)]
    options = ["--hostfile", cluster.hostfile(), "--bind-to", "none", *passed_on]
    return [cluster.start("n1", ["mpirun", "--allow-run-as-root", *options, "python", *script], timeout)]


def by_hand(
    cluster: Slurm, script: Script, timeout: float, hosts: Sequence[str] = ("n1", "n2")
) -> list[RunningCommand]:
    """One process a host, told by variables who it is; rank 0 on the first."""
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": hosts[0], "MASTER_PORT": str(BY_HAND_PORT)}
    return [
        cluster.start(host, ["python", *script], timeout, common | {"RANK": str(rank)})
        for rank, host in enumerate(hosts)
    ]


def in_batch(
    cluster: Slurm, words: Script, timeout: float, options: Sequence[str] = ("-N2", "--ntasks-per-node=1")
) -> ScriptResult:
    """Run a command line as a batch script's only line, to the end."""
    path = cluster.state / "job.sh"
    path.write_text(f"#!/bin/bash\nexec {shlex.join(map(str, words))}\n", encoding="utf-8")
    streams = [cluster.state / f"job.{name}" for name in ("out", "err")]
    for stream in streams:
        stream.unlink(missing_ok=True)
    job = cluster.sbatch(path, options=[*options, "-o", str(streams[0]), "-e", str(streams[1])])
    ended = cluster.wait(job, timeout)
    stdout, stderr = (stream.read_text(encoding="utf-8", errors="replace") for stream in streams)
    return ScriptResult(int(ended["ExitCode"].split(":")[0]), stdout, stderr)


def deepspeed_in_batch(cluster: Slurm, script: Script, timeout: float) -> ScriptResult:
    """``deepspeed --launcher slurm``, which starts the ranks by srun."""
    where = ["--hostfile", cluster.hostfile(), "--no_ssh_check", "--master_addr", "n1"]
    how = ["--launcher", "slurm", "--launcher_args=--ntasks-per-node=1"]
    return in_batch(cluster, ["deepspeed", *where, *how, *script], timeout)


def mpirun_in_batch(cluster: Slurm, script: Script, timeout: float) -> ScriptResult:
    """``mpirun``, which asks SLURM where the nodes are."""
    return in_batch(cluster, ["mpirun", "--allow-run-as-root", "--bind-to", "none", "python", *script], timeout)


def python_in_batch(cluster: Slurm, script: Script, timeout: float) -> ScriptResult:
    """The script itself, where srun was forgotten."""
    return in_batch(cluster, ["python", *script], timeout, ["-N2", "--ntasks=4"])


def together(
    start: Callable[[Slurm, Script, float], Sequence[RunningCommand]],
) -> Callable[[Slurm, Script, float], ScriptResult]:
    """Start as ``start`` does and wait; the result has the highest status and what all have printed."""

    def run(cluster: Slurm, script: Script, timeout: float) -> ScriptResult:
        return collect([running.wait() for running in start(cluster, script, timeout)])

    return run


def collect(results: Sequence[ScriptResult]) -> ScriptResult:
    """One result of several commands'."""
    stdout, stderr = ("".join(getattr(result, stream) for result in results) for stream in ("stdout", "stderr"))
    return ScriptResult(max(result.rc for result in results), stdout, stderr)


Run = Callable[[Slurm, Script, float], ScriptResult]
# Name -> how to run a script, and on how many ranks.
WAYS: Mapping[str, tuple[Run, int]] = {
    "srun": (together(lambda cluster, script, timeout: srun(cluster, script, timeout, 2)), 4),
    "deepspeed --hostfile": (together(deepspeed), 2),
    "deepspeed --launcher slurm": (deepspeed_in_batch, 2),
    "torchrun": (together(torchrun), 2),
    "mpirun --hostfile": (together(mpirun), 2),
    "mpirun in a batch job": (mpirun_in_batch, 2),
    "by hand": (together(by_hand), 2),
    "python in a batch job": (python_in_batch, 1),
}
