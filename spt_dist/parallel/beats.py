"""What each rank tells the others about itself, and what they conclude when something is wrong."""

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from spt_dist.exits import FAULT, LOST, STOPPED, USER_ERROR


class State(str, Enum):
    """How far a rank is: at work, through with it, or ending because it knows what went wrong."""

    RUNNING = "running"
    DONE = "done"
    ENDING = "ending"


@dataclass(frozen=True)
class Beat:
    """One sign of life of a rank.

    Attributes:
        rank: who.
        number: grows with every beat.
        count: how often the rank has reported where it is; ranks that do the same have the same count.
        step, phase: where it is.
        limited: whether the phase has to end within the timeout.
        waiting: whether its main thread waits in a collective.
        state: see ``State``.
        host, pid: where the process is.
        machine: the pid's name space and the running kernel; pids mean something where this is the same.
        born: when the process was started, for a pid may be given again.
    """

    rank: int
    number: int
    count: int
    step: int
    phase: str
    limited: bool
    waiting: bool
    state: State
    host: str
    pid: int
    machine: str
    born: int

    @property
    def who(self) -> str:
        """As messages name the rank."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def where(self) -> str:
        """As messages name the place."""
        return f"step {self.step}, {self.phase}"

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Beat":
        """From the store."""
        values = json.loads(text)
        return Beat(**values | {"state": State(values["state"])})


class Kind(str, Enum):
    """What can be wrong with a run."""

    FAILED = "failed"
    MEMORY = "memory"
    LOST = "lost"
    HUNG = "hung"
    STOPPED = "stopped"
    MISTAKE = "mistake"


NOBODY = -1
_STATUSES = {Kind.STOPPED: STOPPED, Kind.MISTAKE: USER_ERROR}


@dataclass(frozen=True)
class Verdict:
    """What the ranks agree on as the cause of the run's end.

    Attributes:
        kind: see ``Kind``.
        author: the rank that found it, which tells the user; ``NOBODY`` for another one that can't be asked.
        text: the line for the user.
        culprits: ranks whose main threads don't go on.
    """

    kind: Kind
    author: int
    text: str
    culprits: tuple[int, ...] = ()

    def status(self, rank: int) -> int:
        """Exit status of a rank."""
        failed_itself = self.kind in (Kind.FAILED, Kind.MEMORY) and rank == self.author
        return FAULT if failed_itself else _STATUSES.get(self.kind, LOST)

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Verdict":
        """From the store."""
        values = json.loads(text)
        return Verdict(**values | {"kind": Kind(values["kind"]), "culprits": tuple(values["culprits"])})


def first_beat(rank: int) -> Beat:
    """The beat with which this process introduces itself."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    machine = f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    stat = _stat(os.getpid())
    assert stat is not None
    return Beat(
        rank, 0, 0, 0, "starting", False, False, State.RUNNING, socket.gethostname(), os.getpid(), machine, stat[1]
    )


def has_ended(beat: Beat, mine: Beat) -> bool:
    """Whether the process behind a beat is known to be no more. Always false for one on another machine."""
    if beat.machine != mine.machine:
        return False
    stat = _stat(beat.pid)
    return stat is None or stat[0] in "ZX" or stat[1] != beat.born


def waits_for_others(thread_id: int) -> bool:
    """Whether a thread of this process is within a collective, as far as its innermost Python frames tell."""
    frame = sys._current_frames().get(thread_id)
    # A collective called as an operator has a frame of torch's operator machinery inside the one that tells.
    for _ in range(3):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith(("torch.distributed.", "deepspeed.comm.")):
            return True
        frame = frame.f_back
    return False


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time of a process; ``None`` if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the name, is in parentheses and may hold anything.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])
