"""Being asked to stop: SIGTERM and SIGUSR1, as SLURM sends them before it takes a machine away."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """The run was asked to stop.

    No ``Exception``: what mends or reports errors on the way out has to let it pass, as it does KeyboardInterrupt.

    Attributes:
        name: of the signal, or what stands for it where another rank got it.
        step: steps done when every rank stopped after a checkpoint was saved; ``None`` where nothing was saved.
    """

    def __init__(self, name: str, step: int | None = None) -> None:
        super().__init__(name, step)
        self.name, self.step = name, step

    def __str__(self) -> str:
        if self.step is None:
            return f"stopped by {self.name}"
        return f"stopped by {self.name} at step {self.step}; checkpoint saved: go on with --resume"


class StopSignals:
    """SIGTERM and SIGUSR1 raise :class:`Stopped` at once, or in ``deferred()`` are noted for the caller to ask.

    Only the first signal counts: the next ones don't interrupt what is done about it. For the main thread.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    @property
    def requested(self) -> bool:
        """Whether this rank got a signal. The others may have got none: ranks have to agree before they stop."""
        return self._signal != 0

    def stopped(self, step: int) -> Stopped:
        """What to raise once all ranks have stopped after ``step`` steps and a checkpoint of them is saved."""
        name = signal.Signals(self._signal).name if self._signal else "a signal to another rank"
        return Stopped(name, step)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals only set ``requested`` inside; one that nobody acted on raises :class:`Stopped` at the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._signal:
            raise Stopped(signal.Signals(self._signal).name)

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def ignore(self) -> None:
        """Ignore the signals from here to the end of the process: nothing keeps it from saying why it ends.

        A launcher sends SIGTERM to all ranks as soon as one has ended.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = not self._signal
        self._signal = self._signal or number
        if first and not self._deferred:
            raise Stopped(signal.Signals(number).name)
