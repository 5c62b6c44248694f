"""Keeping two runs from writing to one work dir at the same time."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from spt_dist.errors import UserError
from spt_dist.ranks import from_all_ranks
from spt_dist.training.reports import Report

CLAIM = "running"
SECONDS_BETWEEN_LOOKS = 1.0
logger = logging.getLogger(__name__)


@contextmanager
def claim(work_dir: Path, patience: float, report: Report) -> Iterator[None]:
    """Have a work dir for this run alone, as long as the block lasts or rank 0 lives. Collective.

    It is a lock of the file system's on ``WORK_DIR/running``, which goes with the process that holds it, however that
    ends. Where the file system has no locks, nothing is kept from anybody.

    Args:
        work_dir: made if need be.
        patience: seconds to wait for the end of another run: a job that was started again elsewhere, for its node was
            cut off, may come before the old one's ranks have noticed.
        report: is told what is waited for.

    Raises:
        UserError: another run is at work there.
    """
    deadline, warned = time.monotonic() + patience, False
    held, holder = _lock(work_dir / CLAIM) if dist.get_rank() == 0 else (None, "")
    while holder := from_all_ranks(holder)[0]:
        said = f"{work_dir}: another run is at work there ({holder})"
        if from_all_ranks(time.monotonic() > deadline)[0]:
            raise UserError(f"{said}; wait for it or end it, or give another --work-dir")
        if not warned:
            report(0, "waiting for another run to end", limited=False)
            logger.warning("%s; waiting up to %.0f s for its end", said, patience)
            warned = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if dist.get_rank() == 0:
            held, holder = _lock(work_dir / CLAIM)
    try:
        yield
    finally:
        if held is not None:
            # Before the lock goes: after that the file may be another run's.
            (work_dir / CLAIM).unlink(missing_ok=True)
            os.close(held)


def _lock(path: Path) -> tuple[int | None, str]:
    """The descriptor of a file that this process has locked, and who has it locked already; "" for nobody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not flock: its locks go on in the processes that read data.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            return None, holder or "which has just begun"
        except OSError:
            break  # no locks here
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            break
        # Its holder removed it while we were waiting to look.
        os.close(descriptor)
    # Who it is, for whoever is refused; a full disk is no reason not to begin.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor, ""
