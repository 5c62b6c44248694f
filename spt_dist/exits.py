"""How a script of ``launch/`` ends: its exit status, and what it says last.

What the launchers make of the statuses of their ranks:

- ``python`` and ``srun``: the status itself; of several ranks ``srun`` gives the highest. With
  ``--kill-on-bad-exit`` it would kill ranks that are still saving what they have; ``--wait=60`` leaves them a minute.
- ``deepspeed``: the status of the first rank that it finds ended with another one than 0, or 256 less the number of the
  signal that ended it. With several nodes, that of ``pdsh``.
- ``torchrun``: 1 whatever the ranks ended with. Its report names each rank's status as ``exitcode``.
"""

DONE = 0
"""Everything is done."""

FAULT = 1
"""This rank failed: a traceback, or one line where memory ran out."""

USER_ERROR = 2
"""The user can mend it: one line, no traceback."""

STOPPED = 75
"""Stopped by a signal, in training after a checkpoint was saved: start it again with ``--resume``. (EX_TEMPFAIL)"""

LOST = 76
"""This rank ended because another one is gone, failed, hung, or never came. Also the status of a rank that hung."""


class RunEnded(Exception):
    """The run is over, for a reason that one line tells.

    Args:
        message: the line, without a prefix.
        status: exit status of this process.
        tell: whether this rank prints the line; one of them does.
        traceback: whether the traceback of the exception's cause goes before the line.
    """

    def __init__(self, message: str, status: int, tell: bool = True, traceback: bool = False) -> None:
        super().__init__(message)
        self.status, self.tell, self.traceback = status, tell, traceback
