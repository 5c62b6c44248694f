"""Telling how far a rank is."""

from collections.abc import Callable

Report = Callable[[int, str], None]
"""Takes the number of steps done and the name of what a rank does next, as ``parallel.watch.Watch.report`` does."""


def ignore(step: int, phase: str) -> None:
    """A ``Report`` that nobody hears."""
