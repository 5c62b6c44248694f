"""The record of a run: one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from spt_dist.errors import UserError
from spt_dist.files import write_text


class MetricsFile:
    """``metrics.jsonl``: a line a training step, and a line an evaluation. On rank 0 only."""

    def __init__(self, path: Path, num_steps: int) -> None:
        """Open the file; lines of steps after the first ``num_steps`` are dropped, for a resumed run repeats them."""
        kept = [line for line in read_metrics(path) if line["step"] <= num_steps] if num_steps else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append a line; it is on its way to the disk at once, for a killed run to be looked at."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
