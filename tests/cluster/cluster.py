"""Hosts and SLURM on this machine, made by the scripts of this folder: running commands, breaking links and hosts."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from tests.launch.processes import ROOT, ScriptResult, clean_environment, environments

HERE = Path(__file__).parent
HOSTS = ("head", "n1", "n2")
CANT = 77
SECONDS_TO_END = 60.0
# What stays when the rest is cleared.
_DAEMONS = ("slurmctld", "slurmscriptd", "slurmd", "munged")
_LISTENER = "[listener]"


class CantRun(Exception):
    """This machine can't have what a script was to make; the text is the script's reason."""


class RunningCommand:
    """A command under way on a host, its output in files.

    Args:
        process: that waits for the command.
        timeout: seconds after which the command is ended from inside.
        files: of standard output and standard error.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", timeout: float, files: Sequence[Path]) -> None:
        self.process = process
        self._end = time.monotonic() + timeout
        self._files = files

    @property
    def stdout(self) -> str:
        """What the command has printed so far."""
        return self._files[0].read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """What the command has printed so far."""
        return self._files[1].read_text(encoding="utf-8", errors="replace")

    def is_running(self) -> bool:
        """Whether the command has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the command and its process group; ``Cluster.clear`` gets the rest."""
        # Below the process that waits is `timeout`, which has made a group of its own.
        waiting = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(OSError):
            for pid in waiting.read_text(encoding="ascii").split():
                os.killpg(os.getpgid(int(pid)), signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> ScriptResult:
        """Wait for the end of the command; a late one is killed and fails the test with what it has printed.

        Args:
            timeout: seconds from now; what is left of the command's own where it is not given.
        """
        try:
            self.process.wait(timeout or max(0.0, self._end + SECONDS_TO_END - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running: {self.process.args!r}\n{self.stdout}\n{self.stderr}") from None
        rc = self.process.returncode
        # `timeout` ends with 124, or with the SIGKILL that it sends to itself too; but so may the command.
        late = rc in (124, 128 + signal.SIGKILL) and time.monotonic() >= self._end
        assert not late, f"too late: {self.process.args!r}\n{self.stdout}\n{self.stderr}"
        return ScriptResult(rc, self.stdout, self.stderr)


class Cluster:
    """Three hosts, "head", "n1" and "n2", each with its own network, processes, and sshd. Files are shared.

    Args:
        state: folder of the scripts' state; made new.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        # The hosts end when this process does, however it ends: their first processes read from the other side.
        self._lifeline, self._held = os.pipe()
        self.variables: dict[str, str] = {"VC_RUN": str(state)}

    def up(self) -> None:
        """Make the hosts.

        Raises:
            CantRun: not on this machine.
        """
        self._script("hosts_up.sh")

    def down(self) -> None:
        """Take down everything."""
        os.close(self._held)
        os.close(self._lifeline)
        subprocess.run([HERE / "hosts_down.sh"], env=clean_environment() | self.variables, check=True, timeout=120)

    def hostfile(self, slots: int = 1) -> Path:
        """A hostfile of n1 and n2 with so many processes each, as deepspeed and Open MPI read it."""
        path = self.state / f"hostfile.{slots}"
        path.write_text(f"n1 slots={slots}\nn2 slots={slots}\n", encoding="ascii")
        return path

    def start(
        self,
        host: str,
        command: Sequence[str | Path],
        timeout: float = 120.0,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> RunningCommand:
        """Start a command on a host.

        Args:
            host: one of ``HOSTS``.
            command: the program, found in the environment's PATH, and its arguments.
            timeout: seconds after which it gets SIGTERM, and SIGKILL 5 s later.
            env: further environment variables.
            cwd: where it runs.
        """
        bounded = ["timeout", "-k", "5", str(timeout), *map(str, command)]
        name = uuid4().hex
        files = [self.state / "log" / f"{name}.{stream}" for stream in ("out", "err")]
        with open(files[0], "wb") as out, open(files[1], "wb") as err:
            process = subprocess.Popen(
                [str(self.state / "in"), host, *bounded],
                cwd=cwd,
                env=clean_environment() | self.variables | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        return RunningCommand(process, timeout, files)

    def run(
        self,
        host: str,
        command: Sequence[str | Path],
        timeout: float = 120.0,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> ScriptResult:
        """As ``start``, to the end; a command that takes longer fails the test."""
        return self.start(host, command, timeout, env, cwd).wait()

    def processes(self, host: str, *variables: str) -> list[int]:
        """Ids, as this process sees them, of a host's processes that were started with these ``NAME=VALUE``.

        The host's process 1 is not among them.
        """
        first = self._first_process(host)
        inside = _pid_namespace(first)
        wanted = {variable.encode() for variable in variables}
        return [
            pid
            for pid, found in environments()
            if wanted <= set(found) and pid != first and inside and _pid_namespace(pid) == inside
        ]

    def left(self) -> list[int]:
        """Ids of everything on the hosts but the daemons."""
        return [pid for host in HOSTS for pid in self.processes(host) if not _stays(pid)]

    def clear(self) -> None:
        """SIGKILL to everything on the hosts but the daemons; returns when nothing else is left."""
        deadline = time.monotonic() + SECONDS_TO_END
        while left := self.left():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"processes that can't be killed: {left}"
            time.sleep(0.05)

    def cut(self, host: str) -> None:
        """Take the host's network link down, at the switch."""
        self._link(host, "down")

    def mend(self, host: str) -> None:
        """Bring the link up again."""
        self._link(host, "up")

    @contextlib.contextmanager
    def cut_off(self, host: str) -> Iterator[None]:
        """``cut``, for the length of the block."""
        self.cut(host)
        try:
            yield
        finally:
            self.mend(host)

    def kill_host(self, host: str) -> None:
        """End all processes of a host at once; ``start_host`` has to follow.

        The kernel still closes their connections, which a power cut would not: ``cut`` the host before for that.
        """
        pid = self._first_process(host)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS_TO_END
        while Path(f"/proc/{pid}/ns/pid").exists() and _is_alive(pid):
            assert time.monotonic() < deadline, f"{host} does not end"
            time.sleep(0.05)

    def start_host(self, host: str) -> None:
        """Start a host that ``kill_host`` has ended."""
        self._script("host_up.sh", host)

    def path(self, host: str, path: Path) -> Path:
        """Where this process finds a path that is mounted on one host only."""
        return Path(f"/proc/{self._first_process(host)}/root", *path.parts[1:])

    def ranks(self, host: str, work_dir: Path) -> list[int]:
        """Ids, as this process sees them, of a host's ranks that train in this work dir."""
        return [pid for pid in self.processes(host) if _is_rank(pid, str(work_dir))]

    def _script(self, name: str, *arguments: str) -> None:
        lifeline = {"VC_LIFELINE": str(self._lifeline), "VC_SSH_PATH": clean_environment()["PATH"]}
        done = subprocess.run(
            [HERE / name, *arguments],
            env=clean_environment() | self.variables | lifeline,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            pass_fds=[self._lifeline],
        )
        if done.returncode == CANT:
            raise CantRun(done.stdout.strip().rpartition("SKIP: ")[2])
        assert done.returncode == 0, f"{name} ended with status {done.returncode}\n{done.stdout}"

    def _link(self, host: str, state: str) -> None:
        self.run("head", ["ip", "link", "set", f"v-{host}", state], timeout=20).check()

    def _first_process(self, host: str) -> int:
        return int((self.state / "hosts" / f"{host}.pid").read_text(encoding="ascii").split()[0])


class Slurm(Cluster):
    """Those hosts with a SLURM controller on head, and n1 and n2 as nodes of 4 CPUs and 2 GPUs that aren't there.

    Partitions: "main"; "low", whose jobs "high" preempts and requeues; "lowc" and "hasty", whose jobs it cancels, the
    latter's soon. With a job's ``--signal=B:USR1@..`` preemption sends that signal first, see ``no_notice``.

    Args:
        hosts: that are up.
    """

    def __init__(self, hosts: Cluster) -> None:
        self.state, self._lifeline, self._held = hosts.state, hosts._lifeline, hosts._held
        self.folder = hosts.state / "slurm"
        self.variables = hosts.variables | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def up(self) -> None:
        """Start the daemons.

        Raises:
            CantRun: not on this machine.
        """
        self._script("slurm_up.sh")

    def start_host(self, host: str) -> None:
        """Start a host that ``kill_host`` has ended, and its daemon.

        SLURM notices a host's end after 30 to 55 s, and never where the host is back before: the job's other tasks are
        then waited for.
        """
        super().start_host(host)
        self.run(host, ["slurmd", "-N", host]).check()

    def mend(self, host: str) -> None:
        """Bring the link up again, and the node back: left alone, a node that is down is asked once in 20 pings."""
        super().mend(host)
        self.run(host, ["sh", "-c", f'kill -HUP "$(cat "{self.folder}/pid/slurmd.{host}")"']).check()

    def wait_for_nodes(self, timeout: float = 60.0) -> None:
        """Wait until no node is down and none has a job."""
        deadline = time.monotonic() + timeout
        while True:
            shown = self.run("head", ["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"]).check().stdout
            if sorted(shown.split("\n")[:-1]) == ["n1 idle", "n2 idle"]:
                return
            assert time.monotonic() < deadline, shown
            time.sleep(0.2)

    def sbatch(self, script: str | Path, *arguments: str | Path, options: Sequence[str] = (), cwd: Path = ROOT) -> int:
        """Submit a batch script from head; returns the job's id."""
        done = self.run("head", ["sbatch", "--parsable", *options, script, *arguments], cwd=cwd).check()
        return int(done.stdout.split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """The fields that ``scontrol show job`` knows, as "JobState" and "ExitCode" (of an array, the first's)."""
        shown = self.run("head", ["scontrol", "show", "job", "-o", str(job_id)]).check().stdout.splitlines()[0]
        # A value may have spaces; a name never does.
        return dict(re.findall(r"(\S+?)=(.*?)(?= [A-Z][\w/:]*=|\s*$)", shown))

    def state_of(self, job_id: int) -> str:
        """As "RUNNING" or "COMPLETED"."""
        return self.job(job_id)["JobState"]

    def wait(self, job_id: int, timeout: float = 120.0) -> dict[str, str]:
        """The fields of a job once it has ended; one that takes longer is cancelled and fails the test."""
        return self.wait_until(job_id, lambda job: job["JobState"] not in _UNFINISHED, timeout)

    def wait_until(
        self, job_id: int, condition: Callable[[Mapping[str, str]], bool], timeout: float = 120.0
    ) -> dict[str, str]:
        """The fields of a job once ``condition`` holds of them; a job for which it never does fails the test."""
        deadline = time.monotonic() + timeout
        while not condition(job := self.job(job_id)):
            if time.monotonic() > deadline:
                self.run("head", ["scancel", str(job_id)])
                raise AssertionError(f"job {job_id} after {timeout:.0f} s: {job}\n{self.log(job)}")
            time.sleep(0.2)
        return job

    def log(self, job: Mapping[str, str]) -> str:
        """What a job has written, as far as it is in the file of its standard output."""
        path = Path(job.get("StdOut", "/nowhere"))
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @contextlib.contextmanager
    def no_notice(self) -> Iterator[None]:
        """For the length of the block, preemption does not send the signal of ``--signal`` first: SLURM's default."""
        path = self.folder / "slurm.conf"
        before = path.read_text(encoding="ascii")
        path.write_text(before.replace("SlurmctldParameters=preempt_send_user_signal\n", ""), encoding="ascii")
        try:
            self.run("head", ["scontrol", "reconfigure"]).check()
            yield
        finally:
            path.write_text(before, encoding="ascii")
            self.run("head", ["scontrol", "reconfigure"]).check()


_UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "STOPPED")


def _is_rank(pid: int, work_dir: str) -> bool:
    """Whether a process is an interpreter with a script of launch/ as its program, and this work dir as an argument."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    program = next((word for word in words[1:] if not word.startswith("-")), "")
    return "python" in words[0] and "launch/" in program and work_dir in words


def _is_alive(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] != "Z"
        )
    except OSError:
        return False


def _stays(pid: int) -> bool:
    """Whether a process is one of the daemons, or dead."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return True
    return name in _DAEMONS or _LISTENER in command or not _is_alive(pid)


def _pid_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
