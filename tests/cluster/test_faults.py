"""What breaks between hosts: a rank, a network link, a whole host. No rank waits longer than the config says."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from spt_dist.exits import LOST
from tests.cluster.cluster import RunningCommand, Slurm
from tests.cluster.starting import Alone, Script, by_hand, deepspeed, srun, torchrun, train
from tests.launch.processes import ScriptResult
from tests.launch.runs import assert_same_curve, assert_same_task, latest_step, write_config
from tests.launch.test_resume import wait_for_step

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 300.0
STARTED = 3
TIMEOUT = 15
# What the watch and a collective add to the timeout at most, on a machine that has other things to do as well.
MORE = 45.0
NODES = ("n1", "n2")

Start = Callable[[Slurm, Script, float], Sequence[RunningCommand]]


@dataclass(frozen=True)
class Run:
    """A run under way: its commands, in the order of ``NODES`` where there is one on each, and its ranks."""

    work_dir: Path
    commands: Sequence[RunningCommand]
    ranks: dict[str, list[int]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        seconds: host -> how long after the fault its ranks were gone; ``None``: they had to be killed.
        results: of the commands that had an end, by their place.
    """

    seconds: dict[str, float | None]
    results: dict[int, ScriptResult]

    @property
    def lines(self) -> list[str]:
        """The lines by which ranks say what was wrong, without what a launcher puts before them."""
        text = "\n".join(result.stdout + result.stderr for result in self.results.values())
        return re.findall(r"^(?:n\d: )?(error: .*)$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def endless(alone: Alone) -> Path:
    """A config whose run takes longer than any test."""
    return write_config(alone.config.with_name("endless.py"), 5000, alone.config.with_name("backbone.safetensors"))


@pytest.fixture(autouse=True)
def clean(slurm: Slurm) -> Iterator[None]:
    """Leave nothing to the next test."""
    yield
    slurm.clear()
    slurm.wait_for_nodes()


def start_all(slurm: Slurm, config: Path, ways: dict[str, Start], folder: Path, *options: str) -> dict[str, Run]:
    """Start a run in each way; returns when all of them train, one rank on each node."""
    commands = {}
    for name, start in ways.items():
        commands[name] = start(slurm, train(config, folder / name, *options), SECONDS)
    for name, running in commands.items():
        wait_for_step(running[0], folder / name, STARTED, SECONDS)
    runs = {}
    for name, running in commands.items():
        ranks = {host: slurm.ranks(host, folder / name) for host in NODES}
        assert [len(pids) for pids in ranks.values()] == [1, 1], (name, ranks)
        runs[name] = Run(folder / name, running, ranks)
    return runs


def wait_for_ranks(runs: Iterable[Run], hosts: Sequence[str], limit: float) -> list[dict[str, float | None]]:
    """Seconds until the ranks of each run have ended, counted from now, by host."""
    begin = time.monotonic()
    seconds: list[dict[str, float | None]] = [dict.fromkeys(hosts) for _ in runs]
    while time.monotonic() - begin < limit and any(None in found.values() for found in seconds):
        for run, found in zip(runs, seconds, strict=True):
            for host in hosts:
                if found[host] is None and not any(map(is_alive, run.ranks[host])):
                    found[host] = time.monotonic() - begin
        time.sleep(0.1)
    return seconds


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def killed(slurm: Slurm, endless: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Runs whose rank on n2 is killed; the timeout is the default, ten minutes."""
    runs = start_all(slurm, endless, {"srun": srun, "deepspeed": deepspeed}, tmp_path_factory.mktemp("killed"))
    for run in runs.values():
        os.kill(run.ranks["n2"][0], signal.SIGKILL)
    seconds = wait_for_ranks(runs.values(), NODES, MORE)
    return {
        name: Outcome(found, {0: run.commands[0].wait(MORE)})
        for (name, run), found in zip(runs.items(), seconds, strict=True)
    }


@pytest.mark.parametrize("way", ["srun", "deepspeed"])
def test_killed_rank(killed: dict[str, Outcome], way: str) -> None:
    """The rank on the other host ends within seconds and says which one is gone; so does the launcher."""
    outcome = killed[way]
    assert outcome.seconds["n1"] is not None
    assert any(re.match(r"error: rank 1 \(host n2, pid \d+\) .* step \d+", line) for line in outcome.lines), outcome
    if way == "srun":
        # The highest of its tasks' statuses.
        assert outcome.results[0].rc == 128 + signal.SIGKILL
        assert re.search(rf"task 0: Exited with exit code {LOST}\b", outcome.results[0].stderr), outcome
    else:
        assert re.search(rf"n1: .*return code = {LOST}\b", outcome.results[0].stdout + outcome.results[0].stderr)
        assert outcome.results[0].rc != 0


def test_torchrun_restarts_on_both_hosts(slurm: Slurm, alone: Alone, tmp_path: Path) -> None:
    """A killed rank comes back with the other one, from the last checkpoint, and the run is as if nothing was."""
    work_dir = tmp_path / "work"
    script = train(alone.config, work_dir, "--resume", "--cfg-options", "train.checkpoint_steps=3")
    agents = torchrun(slurm, script, SECONDS, "--max-restarts=1")
    wait_for_step(agents[0], work_dir, 10, SECONDS)
    (pid,) = slurm.ranks("n2", work_dir)
    saved = latest_step(work_dir)
    os.kill(pid, signal.SIGKILL)
    for agent in agents:
        agent.wait().check()
    assert_same_curve(work_dir, alone.work_dir)
    assert_same_task(work_dir, alone.work_dir)
    said = re.findall(r"after (\d+) of 56 steps", " ".join((agents[0].stdout + agents[1].stdout).split()))
    assert [int(steps) >= saved > 0 for steps in said] == [True], "resumed once, from a checkpoint"


WAYS: dict[str, Start] = {"srun": srun, "deepspeed": deepspeed, "torchrun": torchrun}


@pytest.fixture(scope="module")
def severed(slurm: Slurm, endless: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Runs in whose middle the link of n2 is cut. One cut for all, since each waits for the timeout."""
    options = ["--cfg-options", f"engine.timeout={TIMEOUT}"]
    runs = start_all(slurm, endless, WAYS, tmp_path_factory.mktemp("severed"), *options)
    with slurm.cut_off("n2"):
        seconds = wait_for_ranks(runs.values(), NODES, TIMEOUT + MORE)
        # What n2 has to say of its task does not come to srun, which ends when SLURM finds the node down.
        runs["srun"].commands[0].wait(2 * MORE)
    outcomes = {}
    for (name, run), found in zip(runs.items(), seconds, strict=True):
        results = {}
        for place, command in enumerate(run.commands):
            # torchrun waits for agents to come back. The one that can be heard first says how its rank ended, if only
            # when it has looked.
            if name == "torchrun":
                begin = time.monotonic()
                while place == 0 and not said_status(command) and time.monotonic() - begin < MORE:
                    time.sleep(0.1)
                command.kill()
            results[place] = command.wait(MORE)
        outcomes[name] = Outcome(found, results)
    return outcomes


@pytest.mark.parametrize("way", WAYS)
def test_cut_network_ends_every_rank(severed: dict[str, Outcome], way: str) -> None:
    """On both sides, within the config's timeout, though gloo's is 30 minutes and TCP's longer still."""
    for host, seconds in severed[way].seconds.items():
        # Not at once either: a network may come back.
        assert seconds is not None and seconds > TIMEOUT / 2, (host, severed[way])


@pytest.mark.parametrize("way", WAYS)
def test_cut_network_is_said(severed: dict[str, Outcome], way: str) -> None:
    """By a rank that can be heard: who does not answer, where it was, and with the status for it."""
    pattern = r"error: rank \d \(host n\d, pid \d+\) .* can't be reached.* step \d+|error: the launcher's process at n1"
    assert any(re.match(pattern, line) for line in severed[way].lines), severed[way]
    assert said_status(severed[way].results[0]), severed[way]


def said_status(command: RunningCommand | ScriptResult) -> bool:
    """Whether a launcher has said that a rank of its ended because of another."""
    return re.search(rf"(exit code|return code =|exitcode *:) {LOST}\b", command.stdout + command.stderr) is not None


@pytest.fixture(scope="module")
def powerless(slurm: Slurm, endless: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Runs of which host n2 is lost, with rank 1 on it, and with rank 0 and the store on it."""
    ways: dict[str, Start] = {
        "srun": srun,
        "by hand": lambda cluster, script, timeout: by_hand(cluster, script, timeout, ("n2", "n1")),
    }
    options = ["--cfg-options", f"engine.timeout={TIMEOUT}"]
    runs = start_all(slurm, endless, ways, tmp_path_factory.mktemp("powerless"), *options)
    slurm.kill_host("n2")
    try:
        seconds = wait_for_ranks(runs.values(), ["n1"], TIMEOUT + MORE)
        # srun ends when SLURM has noticed.
        results = [runs["srun"].commands[0].wait(90), runs["by hand"].commands[1].wait(MORE)]
    finally:
        slurm.start_host("n2")
    return {name: Outcome(found, {0: result}) for name, found, result in zip(runs, seconds, results, strict=True)}


@pytest.mark.parametrize(("way", "rank"), [("srun", 1), ("by hand", 0)])
def test_lost_host(powerless: dict[str, Outcome], way: str, rank: int) -> None:
    """The rank on the other one ends within the timeout and names rank and host."""
    outcome = powerless[way]
    assert outcome.seconds["n1"] is not None, outcome
    assert any(re.match(rf"error: rank {rank} \(host n2, pid \d+\) .* step \d+", line) for line in outcome.lines)
    assert outcome.results[0].rc == LOST
