"""Doing something in a thread that keeps no process from ending, as those of a pool do."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> "Future[T]":
    """Call ``work`` in a thread of its own; what it returns, or raises, is in the future."""
    future: Future[T] = Future()

    def fill() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=fill, daemon=True).start()
    return future
