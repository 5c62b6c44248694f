"""Starting the scripts of ``launch/`` as real processes, with every rank's end guaranteed."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("python", "torchrun", "deepspeed")
# Every process of a launch inherits this variable: torchrun gives its workers sessions of their own, so that
# neither the process group nor the session is enough to find them.
_TOKEN = "SPT_TEST_LAUNCH"
_LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "TORCHELASTIC_", "MASTER_")
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@dataclass(frozen=True)
class ScriptResult:
    """How a launch ended: exit status of the launcher and everything that was printed."""

    rc: int
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        """The lines that the scripts print for a user's mistake."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    def check(self) -> "ScriptResult":
        """This result, if the launch was successful."""
        assert self.rc == 0, f"exit status {self.rc}\n{self.stdout}\n{self.stderr}"
        return self


@dataclass(frozen=True)
class Launch:
    """One launch: a script below ``launch/`` with its arguments, and how it is started."""

    arguments: Sequence[str | Path]
    launcher: str = "python"
    ranks: int = 1
    timeout: float = 180.0
    env: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> ScriptResult:
        """As ``run_script``."""
        return run_script(self.arguments, self.launcher, self.ranks, self.timeout, self.env)


class RunningScript:
    """A launch under way."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        launcher: str,
        ranks: int,
        env: Mapping[str, str] | None = None,
        launcher_options: Sequence[str] = (),
    ) -> None:
        self.token = f"{_TOKEN}={uuid4().hex}"
        name, _, value = self.token.partition("=")
        self.process = subprocess.Popen(
            [*_command(launcher, ranks), *launcher_options, *(str(argument) for argument in _under_root(arguments))],
            cwd=ROOT,
            env=clean_environment() | dict(env or {}) | {name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def is_running(self) -> bool:
        """Whether the launcher is alive."""
        return self.process.poll() is None

    def processes(self, variable: str = "") -> list[int]:
        """Ids of the launch's live processes, the launcher's own included.

        Args:
            variable: ``NAME=VALUE`` that the process has to have been started with, for one rank's processes.
        """
        return [
            pid
            for pid, variables in environments()
            if self.token.encode() in variables and (not variable or variable.encode() in variables)
        ]

    def kill(self) -> None:
        """SIGKILL to every process of the launch; returns when none is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # Whoever was just being started while we looked is found by the next look.
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float) -> ScriptResult:
        """Wait for the end; a launch that takes longer is killed and fails the test with what it has printed.

        The end is that of all its processes, for each holds the output open: a rank that the launcher leaves
        behind is noticed.
        """
        late = False
        try:
            stdout, stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            late = True
            self.kill()
            stdout, stderr = self.process.communicate()
        finally:
            self.kill()
        assert not late, f"still running after {timeout} s: {self.process.args}\n{stdout}\n{stderr}"
        return ScriptResult(self.process.returncode, stdout, stderr)


def run_script(
    arguments: Sequence[str | Path],
    launcher: str = "python",
    ranks: int = 1,
    timeout: float = 180.0,
    env: Mapping[str, str] | None = None,
) -> ScriptResult:
    """Run a script of ``launch/`` to its end; none of its processes outlives the call.

    Args:
        arguments: name of the script and its arguments.
        launcher: "python" (one rank), "torchrun" or "deepspeed".
        ranks: number of processes.
        timeout: seconds after which every process is killed and the test fails.
        env: further environment variables.
    """
    return RunningScript(arguments, launcher, ranks, env).wait(timeout)


def run_all(launches: Mapping[str, Launch], at_once: int = 2) -> dict[str, ScriptResult]:
    """Run several launches, ``at_once`` of them side by side (most of each is one process importing libraries)."""
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(launches, pool.map(Launch.run, launches.values()), strict=True))


def wait_until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Poll."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def standing_still(pids: Sequence[int]) -> Iterator[None]:
    """For the length of the block these processes do nothing, however slow we are."""
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        # A thread ends first what it does in the kernel.
        wait_until(lambda: not any(map(_moves, pids)))
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below ``directory``."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def _command(launcher: str, ranks: int) -> list[str]:
    assert launcher in LAUNCHERS
    if launcher == "python":
        assert ranks == 1
        return [sys.executable]
    port = ["--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    if launcher == "torchrun":
        return ["torchrun", "--nnodes", "1", "--nproc_per_node", str(ranks), *port]
    return ["deepspeed", "--num_accelerators", str(ranks), *port]


def _under_root(arguments: Sequence[str | Path]) -> list[str | Path]:
    script, *others = arguments
    return [f"launch/{script}", *others]


def clean_environment() -> dict[str, str]:
    """Our own environment without what a launcher around the tests may have set, and one thread a rank."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def environments() -> Iterator[tuple[int, list[bytes]]]:
    """Id and initial environment of every process that we may look at; a zombie's is empty."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(folder.name), (folder / "environ").read_bytes().split(b"\0")


def _moves(pid: int) -> bool:
    """Whether a thread of a process is neither stopped nor over."""
    states = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            states.append(path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0])
    return any(state not in "TtZX" for state in states)


def _free_port() -> int:
    """A free port below the range from which the kernel serves connections, so that none of ours takes it."""
    choice = random.SystemRandom()
    for _ in range(100):
        port = choice.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("found no free port")
