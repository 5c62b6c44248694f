"""Telling how far a rank is."""

from typing import Protocol


class Report(Protocol):
    """As ``parallel.watch.Watch.report``."""

    def __call__(self, step: int, phase: str, limited: bool = True) -> None:
        """Take the number of steps done, the name of what a rank does next, and whether that may take only so long."""


def ignore(step: int, phase: str, limited: bool = True) -> None:
    """A ``Report`` that nobody hears."""
