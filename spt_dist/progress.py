"""Progress bars, on rank 0 only."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bar:
    """A progress bar that may be switched off."""

    def __init__(self, progress: Progress | None, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Go on by ``steps`` and show ``note`` behind the bar."""
        if self._progress is not None:
            self._progress.update(self._task, advance=steps, note=note)


@contextmanager
def progress_bar(description: str, total: int, enabled: bool, completed: int = 0) -> Iterator[Bar]:
    """A bar for the length of the block; nothing at all where ``enabled`` is false.

    Args:
        description: what is going on.
        total: number of steps.
        enabled: true on the rank that shows progress.
        completed: steps done already (a resumed run).
    """
    if not enabled:
        yield Bar(None, TaskID(0))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as progress:
        yield Bar(progress, progress.add_task(description, total=total, completed=completed, note=""))
