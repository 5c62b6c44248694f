"""The log of each rank, in a file of its own."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PACKAGE = "spt_dist"


@contextmanager
def rank_log(work_dir: Path, rank: int) -> Iterator[None]:
    """Write what this rank logs in the block to ``logs/rank-N.log`` in the work dir.

    That is INFO and above of spt_dist, WARNING and above of everything else, and the traceback of an exception that
    leaves the block. An existing file is continued. What the terminal shows stays as it is.
    """
    path = work_dir / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda record: record.levelno >= (logging.INFO if _is_ours(record) else logging.WARNING))
    with ExitStack() as stack:
        stack.callback(handler.close)
        _write(handler, logging.INFO, f"process {os.getpid()} on {socket.gethostname()} begins")
        _attach(handler, stack)
        try:
            yield
        except BaseException:
            # To the file only: for the terminal this is up to whoever catches it.
            _write(handler, logging.ERROR, "ended by an exception", with_traceback=True)
            raise


def _attach(handler: logging.Handler, stack: ExitStack) -> None:
    """Let ``handler`` have what ours logs from INFO on, and the handlers there are what they had before."""
    root, ours = logging.getLogger(), logging.getLogger(PACKAGE)
    level, shown = ours.level, ours.getEffectiveLevel()

    def as_before(record: logging.LogRecord) -> bool:
        return not _is_ours(record) or record.levelno >= shown

    for other in root.handlers:
        other.addFilter(as_before)
        stack.callback(other.removeFilter, as_before)
    root.addHandler(handler)
    stack.callback(root.removeHandler, handler)
    ours.setLevel(min(shown, logging.INFO))
    stack.callback(ours.setLevel, level)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.split(".")[0] == PACKAGE


def _write(handler: logging.Handler, level: int, message: str, with_traceback: bool = False) -> None:
    exception = sys.exc_info() if with_traceback else None
    handler.handle(logging.LogRecord(__name__, level, __file__, 0, message, (), exception))
