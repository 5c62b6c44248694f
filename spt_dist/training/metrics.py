"""The record of a run: one JSON object a line."""

import contextlib
import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from spt_dist.errors import UserError
from spt_dist.files import write_text

logger = logging.getLogger(__name__)


class MetricsFile:
    """``metrics.jsonl``: a line a training step, and a line an evaluation. Context manager.

    A full disk costs lines, with one warning, and not the run.
    """

    def __init__(self, path: Path, num_steps: int, enabled: bool = True) -> None:
        """Open the file; lines of steps after the first ``num_steps`` are dropped, for a resumed run repeats them.

        Args:
            path: the file.
            num_steps: steps done already.
            enabled: whether this is the rank that writes.
        """
        self._file: TextIO | None = None
        self._path, self._is_incomplete = path, False
        if not enabled:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= num_steps] if num_steps else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append a line; it is on its way to the disk at once, for a killed run to be looked at."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._is_incomplete:
                logger.error("%s can't be written (%s); lines will be missing", self._path, error)
            self._is_incomplete = True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none if there is no file; a last line cut short by a kill is left out.

    Raises:
        UserError: a line in the middle is no JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    result = []
    for number, line in enumerate(lines, 1):
        try:
            result.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a line of metrics ({error}); delete the file") from error
    return result
