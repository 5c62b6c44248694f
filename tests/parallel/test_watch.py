"""A rank that fails, is killed or hangs ends the whole run soon, with one line that names it and says where it was."""

import re
import shlex
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from spt_dist import UserError
from spt_dist.exits import FAULT, LOST, STOPPED, USER_ERROR, RunEnded
from spt_dist.parallel.beats import first_beat
from spt_dist.parallel.signals import Stopped
from spt_dist.parallel.store import Address, Board
from spt_dist.parallel.watch import SECONDS_FOR_FIRST, Watch
from tests.launch.processes import RunningScript, ScriptResult

slow = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(3600)]

WHO = r"rank {} \(host \S+, pid {}\)"
# What ending takes on a busy machine, the launchers' own time included. After half a minute they kill who is left.
SECONDS_TO_END = 28


@dataclass(frozen=True)
class Case:
    """A fault, and how the run has to end.

    Attributes:
        arguments: of ``faulty_run.py``.
        line: regular expression of the one line; ``{who}`` is the faulty rank with its host and pid. Empty for none.
        status: exit status that the launcher ought to pass on; torchrun makes 1 of any but 0.
        launcher, ranks: as in ``run_script``.
        seconds: from the fault to the end, besides ``SECONDS_TO_END``.
        traceback: last line of the traceback that comes with the line.
        env: environment variables.
        notes: what the ranks have to leave behind, in the order of the ranks.
    """

    arguments: str
    line: str
    status: int
    launcher: str = "torchrun"
    ranks: int = 2
    seconds: float = 0
    traceback: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


GONE = r"error: {who} is gone( or can't be reached)? \(.*\); it was last seen at step 3, training step"
FAILED = r"error: {who} failed at step 3, training step: RuntimeError: the cat sat on the keyboard"
MEMORY = r"error: {who} ran out of memory at step 3, training step: .*; lower train\.batch_size, .*"
SAVED = r"stopped by (SIGTERM|SIGUSR1|a signal to another rank) at step 4; checkpoint saved: go on with --resume"
NOT_SAVED = r"error: stopped by SIGTERM: {who} at step 0, scoring; nothing was saved .*"
HUNG = r"error: no progress for 10 s: {who} is at step 3, "
SILENT = r"error: {who} has given no sign of life for \d+ s .*; it was last seen at step 3, training step"
STOP = "--fault stop --rank 1 --timeout 10 --seconds 16"
LOADING = "--fault sleep --rank 1 --phase 'loading data' --timeout 10"
DONE = ("done", "done")

CASES = {
    "no fault": Case("", "", 0, notes=DONE),
    "no fault, deepspeed": Case("", "", 0, "deepspeed", notes=DONE),
    "slow rank": Case("--fault sleep --rank 1 --seconds 3 --timeout 12", "", 0, notes=DONE),
    "rank stopped for a while": Case("--fault stop --rank 0 --seconds 3 --timeout 12", "", 0, "deepspeed", notes=DONE),
    "run suspended": Case("--fault stop --rank -1 --seconds 16 --timeout 10", "", 0, notes=DONE),
    "late goodbye": Case(
        "--fault sleep --rank 1 --seconds 3 --step 12 --phase 'writing results'", "", 0, "deepspeed", notes=DONE
    ),
    "kill 0": Case("--fault kill --rank 0", GONE, 1),
    "kill 1": Case("--fault kill --rank 1", GONE, 1),
    "kill 0, deepspeed": Case("--fault kill --rank 0", GONE, 256 - 9, "deepspeed"),
    "kill 1, deepspeed": Case("--fault kill --rank 1", GONE, 256 - 9, "deepspeed"),
    "kill 1 while 0 is busy": Case(
        "--fault 'kill busy' --rank 1 --step 0 --phase scoring", GONE.replace("3, training step", "0, scoring"), 1
    ),
    "kill 2 of 3": Case("--fault kill --rank 2", GONE, 1, ranks=3),
    "fail": Case("--fault fail --rank 1", FAILED, FAULT, traceback="RuntimeError: the cat sat on the keyboard"),
    "fail, deepspeed": Case(
        "--fault fail --rank 0", FAILED, FAULT, "deepspeed", traceback="RuntimeError: the cat sat on the keyboard"
    ),
    "fail everywhere": Case(
        "--fault fail --rank -1", FAILED, FAULT, traceback="RuntimeError: the cat sat on the keyboard"
    ),
    "fail alone": Case(
        "--fault fail", FAILED, FAULT, "python", 1, traceback="RuntimeError: the cat sat on the keyboard"
    ),
    "fail while another can't hear": Case(
        "--fault 'fail deaf' --rank 0",
        FAILED,
        FAULT,
        "deepspeed",
        3,
        seconds=30,
        traceback="RuntimeError: the cat sat on the keyboard",
    ),
    "no memory": Case("--fault exhaust --rank 1", MEMORY, FAULT, "deepspeed"),
    "no memory in Python": Case("--fault exhaust_python --rank 1", MEMORY, FAULT),
    "mistake of one rank": Case(
        "--fault mistake --rank 1", r"error: rank 1: task: no such shard; make one", 2, seconds=20
    ),
    "hung in loading": Case(LOADING, HUNG + "loading data", LOST, seconds=10),
    "hung in loading, deepspeed": Case(LOADING, HUNG + "loading data", LOST, "deepspeed", seconds=10),
    "hung in a loop": Case("--fault spin --rank 0 --timeout 10", HUNG + "training step", LOST, seconds=10),
    "hung alone": Case("--fault spin --timeout 10", HUNG + "training step", LOST, "python", 1, seconds=10),
    "stopped for long": Case(STOP, SILENT, LOST, seconds=16),
    "stopped for long, deepspeed": Case(STOP, SILENT, LOST, "deepspeed", seconds=16),
    "never comes": Case(
        "--fault sleep --rank 1 --phase 'before joining' --step 0 --timeout 4",
        r"error: rank 1 has not come to join the others within 4 s; .*",
        LOST,
        seconds=4,
    ),
    "rank 0 never comes": Case(
        "--fault sleep --rank 0 --phase 'before joining' --step 0 --timeout 4",
        r"error: rank 0 has not come to join the others within 4 s: nobody listens at .*",
        LOST,
        "deepspeed",
        seconds=4,
    ),
    "SIGTERM to one": Case("--fault term --rank 1", SAVED, STOPPED, "deepspeed", notes=("saved 4", "saved 4")),
    "SIGTERM twice": Case("--fault 'term twice' --rank 1", SAVED, STOPPED, notes=("saved 4", "saved 4")),
    "SIGUSR1": Case("--fault usr1 --rank -1", SAVED, STOPPED, notes=("saved 4", "saved 4")),
    "SIGTERM in scoring": Case(
        "--fault term --rank 1 --step 0 --phase scoring", NOT_SAVED, STOPPED, "deepspeed", seconds=4
    ),
    "restart": Case("--fault 'kill once' --rank 1", GONE, 0, env={"PET_MAX_RESTARTS": "2"}, notes=("done 2 1",) * 2),
}


@dataclass(frozen=True)
class Outcome:
    """How a case ended: the launcher's result, seconds from the fault to the end, and the files of the ranks."""

    result: ScriptResult
    seconds: float
    folder: Path

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")


def run_case(case: Case, folder: Path) -> Outcome:
    arguments = shlex.split(case.arguments)
    script = RunningScript(
        ["../tests/parallel/faulty_run.py", "--out", folder, *arguments], case.launcher, case.ranks, case.env
    )
    result = script.wait(400)
    happened = folder / "happened"
    return Outcome(result, time.time() - float(happened.read_text()) if happened.exists() else 0.0, folder)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    """Every case that was asked for, two at a time: half of each is one process importing libraries."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec") and "name" in item.callspec.params
    ]
    folders = {name: tmp_path_factory.mktemp("case") for name in dict.fromkeys(names)}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(folders, pool.map(lambda name: run_case(CASES[name], folders[name]), folders), strict=True))


def ours(stderr: str) -> list[str]:
    """The lines that the scripts print, without launchers' accounts."""
    return [line for line in stderr.splitlines() if line.startswith(("error: ", "stopped by "))]


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in CASES])
def test_one_line_names_the_rank_and_where_it_was(outcomes: Mapping[str, Outcome], name: str) -> None:
    case, outcome = CASES[name], outcomes[name]
    stderr = outcome.result.stderr
    if not case.line:
        assert ours(stderr) == []
        return
    found = re.search(r"--rank (-?\d)", case.arguments)
    rank = int(found[1]) if found else 0
    ranks = range(case.ranks) if rank < 0 else [rank]
    # The file of a rank that was started again holds its new pid.
    whos = [WHO.format(rank, r"\d+" if case.env else outcome.read(f"pid-{rank}")) for rank in ranks]
    pattern = case.line.replace("{who}", f"({'|'.join(whos)})")
    assert [bool(re.fullmatch(pattern, line)) for line in ours(stderr)] == [True], stderr
    of_launcher = case.launcher == "torchrun" and case.status != 0
    assert stderr.count("Traceback (most recent call last)") == of_launcher + bool(case.traceback), stderr
    if case.traceback:
        assert f"\n{case.traceback}\n{ours(stderr)[0]}\n" in stderr


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in CASES])
def test_exit_status(outcomes: Mapping[str, Outcome], name: str) -> None:
    case, result = CASES[name], outcomes[name].result
    if case.launcher != "torchrun" or case.status == 0:
        # A rank that ends because another was killed may be the first that the launcher finds.
        killed = case.status == 256 - 9
        assert result.rc in ({case.status, LOST} if killed else {case.status}), result.stderr
        return
    assert result.rc == 1
    root_cause = re.search(r"Root Cause.*?exitcode +: (-?\d+) ", result.stderr, re.DOTALL)
    assert root_cause is not None, result.stderr
    assert int(root_cause[1]) == (-9 if "kill" in case.arguments else case.status), result.stderr


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in CASES])
def test_the_end_comes_soon(outcomes: Mapping[str, Outcome], name: str) -> None:
    case, outcome = CASES[name], outcomes[name]
    if case.status:
        assert 0 < outcome.seconds < case.seconds + SECONDS_TO_END


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in CASES if CASES[name].notes])
def test_what_ranks_leave_behind(outcomes: Mapping[str, Outcome], name: str) -> None:
    for rank, note in enumerate(CASES[name].notes):
        assert outcomes[name].read(f"note-{rank}").startswith(note)


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in CASES if name.startswith("hung")])
def test_a_hung_rank_shows_its_stack(outcomes: Mapping[str, Outcome], name: str) -> None:
    stderr = outcomes[name].result.stderr
    assert re.search(r"^rank \d is at:\n( .*\n)+.*in (spin|<lambda>)\n", stderr, re.MULTILINE), stderr


@pytest.fixture
def watch() -> Watch:
    board = Board(dist.HashStore(), "attempt")
    beat = first_beat(0)
    board.publish(beat)
    watch = Watch(board, beat, 1, 30.0, Address("here", 1, False), True)
    watch.report(12, "evaluation")
    return watch


@pytest.mark.parametrize(
    ("error", "status", "message", "shows_traceback"),
    [
        (KeyError("x"), FAULT, r"rank 0 \(host \S+, pid \d+\) failed at step 12, evaluation: KeyError: 'x'", True),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nMore."),
            FAULT,
            r".* evaluation: CUDA out of memory\.; lower ",
            False,
        ),
        (MemoryError(), FAULT, r".* ran out of memory at step 12, evaluation: MemoryError; lower train\.", False),
        (
            KeyboardInterrupt(),
            STOPPED,
            r"stopped by SIGINT: rank 0 .* at step 12, evaluation; nothing was saved",
            False,
        ),
        (
            Stopped("SIGTERM"),
            STOPPED,
            r"stopped by SIGTERM: rank 0 .* at step 12, evaluation; nothing was saved",
            False,
        ),
        (dist.DistNetworkError("closed"), FAULT, r".* lost another rank, none of which says why, at step 12", True),
    ],
)
def test_what_an_error_of_a_rank_becomes(
    watch: Watch, error: BaseException, status: int, message: str, shows_traceback: bool
) -> None:
    with pytest.raises(RunEnded, match=message) as caught, watch:
        raise error
    assert caught.value.__cause__ is error
    assert (caught.value.status, caught.value.tell, caught.value.traceback) == (status, True, shows_traceback)


def test_who_finds_a_rank_gone_stays_until_launchers_have_found_it_too() -> None:
    board = Board(dist.HashStore(), "attempt")
    board.publish(first_beat(0))
    board.publish(replace(first_beat(1), born=0))  # the process is another one by now
    started = time.monotonic()
    with (
        pytest.raises(RunEnded, match=r"rank 1 .* is gone \(killed, .*") as caught,
        Watch(board, first_beat(0), 2, 30.0, Address("here", 1, True), True),
    ):
        raise dist.DistNetworkError("closed")
    assert (caught.value.status, caught.value.tell) == (LOST, True)
    assert time.monotonic() - started > SECONDS_FOR_FIRST


@pytest.mark.parametrize("error", [UserError("config: no"), FileNotFoundError(2, "No such file", "nowhere")])
def test_a_mistake_stays_what_it_is(watch: Watch, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, watch:
        raise error
    assert caught.value is error
    assert watch.verdict is not None and watch.verdict.status(1) == USER_ERROR


def test_a_stop_after_a_checkpoint_is_an_ordinary_end_for_the_others(watch: Watch) -> None:
    with pytest.raises(Stopped), watch:
        raise Stopped("SIGTERM", 3)
    assert watch.verdict is None


def test_an_ordinary_end_leaves_no_thread(watch: Watch) -> None:
    with watch:
        watch.report(13, "saving a checkpoint")
    for thread in watch._threads:
        thread.join(60)
    assert watch.verdict is None and not any(thread.is_alive() for thread in watch._threads)
