"""What is measured while training goes on: speed, waiting for data, memory; and where it is told."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spt_dist.evaluation.scores import METRIC_LABELS
from spt_dist.sections import RunConfig
from spt_dist.training.curves import Curves
from spt_dist.training.metrics import MetricsFile

logger = logging.getLogger(__name__)
T = TypeVar("T")
GIB = 2**30


@dataclass(frozen=True)
class SpeedSummary:
    """The speed and memory of a whole run, without its first interval, in which things warm up.

    Attributes:
        samples_per_second: images over seconds of training (evaluation and checkpoints not counted), over all ranks
            together; ``None`` where no step was trained, as in the next.
        data_wait: share of those seconds spent waiting for data, 0 to 1, on the rank that waited longest.
        peak_memory_gib: of each rank, in GiB: allocated on its GPU; without one, resident in its process.
    """

    samples_per_second: float | None
    data_wait: float | None
    peak_memory_gib: list[float]


@dataclass
class _Span:
    """Steps in a row: their samples over all ranks, their seconds, and the seconds of these spent waiting for data."""

    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, samples: int, seconds: float, waited: float) -> None:
        self.samples += samples
        self.seconds += seconds
        self.waited += waited


class _Step(NamedTuple):
    number: int
    loss: float | Tensor
    lr: float
    grad_norm: float | Tensor


class Monitor:
    """Measures a training run; the trainer tells it what happens, on every rank.

    Seconds of training run from the moment a step asks for its data (``timed``) to its end (``step``): evaluation and
    checkpoints between two steps are not in them. Points go to the curves and to ``speed.jsonl`` in the work dir each
    ``log.interval`` steps and at the end of an epoch. To be closed, or used as a context manager.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        num_steps: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open curves and files, on rank 0.

        Args:
            config: of the run.
            device: where this rank trains. The peak of a GPU's memory is counted from here on.
            num_steps: steps done already, in a resumed run.
            clock: seconds that only go forward.

        Raises:
            UserError: a backend of the curves can't be started.
        """
        self._interval_steps, self._train = config.log.interval, config.train
        self._device, self._clock = device, clock
        self._curves = self._speed = None
        if dist.get_rank() == 0:
            self._curves = Curves(config, num_steps)
            self._speed = MetricsFile(Path(config.work_dir) / "speed.jsonl", num_steps)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._asked: float | None = None
        self._waited = 0.0
        self._interval, self._epoch, self._run = _Span(), _Span(), _Span()
        self._warm_up: _Span | None = None
        self._last: _Step | None = None
        self._scores: dict[str, float] = {}
        self._summary = SpeedSummary(None, None, [])

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with the time taken that each one is waited for."""
        iterator = iter(batches)
        while True:
            asked = self._clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += self._clock() - asked
            self._asked = asked if self._asked is None else self._asked
            yield batch

    def step(self, *, step: int, loss: float | Tensor, lr: float, grad_norm: float | Tensor, num_samples: int) -> None:
        """A step is over.

        Args:
            step: how many steps are done, this one included.
            loss, grad_norm: of the whole global batch. Tensors are read at the end of an interval only: a GPU is not
                waited for at each step.
            lr: its learning rate.
            num_samples: of the global batch.
        """
        assert self._asked is not None, "the batches of a step come through timed()"
        self._last = _Step(step, loss, lr, grad_norm)
        ends_interval = step % self._interval_steps == 0
        if ends_interval:
            # What the GPU still has to do belongs to this interval.
            float(loss)
        seconds = self._clock() - self._asked
        for span in (self._interval, self._epoch, self._run):
            span.add(num_samples, seconds, self._waited)
        self._asked, self._waited = None, 0.0
        if ends_interval:
            self._end_interval()

    def evaluation(self, step: int, **scores: float) -> None:
        """The model was evaluated after ``step`` steps; each score is a share, 0 to 1 (``top1=0.93``)."""
        self._scores = scores
        if self._curves is not None:
            self._curves.add(step, {f"val/{name}": score for name, score in scores.items()})

    def saved(self, step: int, path: Path, seconds: float, num_bytes: int) -> None:
        """A checkpoint was written after ``step`` steps."""
        logger.info("saved %s (%.1f MiB in %.1f s)", path, num_bytes / 2**20, seconds)
        if self._curves is not None:
            self._curves.add(step, {"checkpoint/seconds": seconds, "checkpoint/mib": num_bytes / 2**20})

    def epoch_end(self, epoch: int) -> None:
        """An epoch is over: log a line about it. Collective.

        Args:
            epoch: counted from 0.
        """
        if self._interval.samples:
            self._end_interval()
        assert self._last is not None and self._warm_up is not None, "an epoch has steps"
        steady = self._run if self._run.samples else self._warm_up
        wait_R, steady_wait_R, peak_R = self._gather(
            self._epoch.waited / self._epoch.seconds, steady.waited / steady.seconds, peak_memory(self._device)
        )
        memory = [peak / GIB for peak in peak_R]
        self._summary = SpeedSummary(steady.samples / steady.seconds, max(steady_wait_R), memory)
        if self._curves is not None:
            self._curves.add(self._last.number, {f"memory/rank_{rank}_gib": gib for rank, gib in enumerate(memory)})
        parts = [
            f"loss {float(self._last.loss):.4f}",
            *(f"{METRIC_LABELS.get(name, name)} {100 * score:.2f} %" for name, score in self._scores.items()),
            f"{_short(self._epoch.samples / self._epoch.seconds)} samples/s",
            f"{100 * max(wait_R):.1f} % waiting for data{_which(wait_R)}",
            f"peak memory {max(memory):.2f} GiB{_which(memory)}",
        ]
        of = f"step {self._last.number} of {self._train.iterations}"
        if self._train.epochs is not None:
            of = f"epoch {epoch + 1} of {self._train.epochs}"
        logger.info("%s: %s", of, ", ".join(parts))
        self._epoch, self._scores = _Span(), {}

    def summary(self) -> SpeedSummary:
        """The run up to its last full epoch."""
        return self._summary

    def close(self) -> None:
        """Close curves and files."""
        if self._curves is not None and self._speed is not None:
            self._curves.close()
            self._speed.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _end_interval(self) -> None:
        """A point of the curves, and a line of ``speed.jsonl``."""
        assert self._last is not None
        step, loss, lr, grad_norm = self._last
        speed = self._interval.samples / self._interval.seconds
        wait = self._interval.waited / self._interval.seconds
        if self._curves is not None and self._speed is not None:
            self._speed.write(step=step, samples_per_second=speed, data_wait=wait, seconds=self._interval.seconds)
            values = {"train/loss": float(loss), "train/lr": lr, "train/grad_norm": float(grad_norm)}
            self._curves.add(step, {**values, "speed/samples_per_second": speed, "speed/data_wait": wait})
        self._interval = _Span()
        if self._warm_up is None:
            self._warm_up, self._run = self._run, _Span()

    def _gather(self, *values: float) -> list[list[float]]:
        """For each value those of all ranks, in their order."""
        mine = torch.tensor(values, dtype=torch.float64, device=self._device)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        columns: list[list[float]] = torch.stack(gathered, dim=1).tolist()
        return columns


def peak_memory(device: torch.device) -> int:
    """Bytes that were allocated at most on a GPU since its count began; on the CPU that were resident at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: a process starts there with the peak of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _short(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"


def _which(value_R: list[float]) -> str:
    """Which rank has the largest value, where there are several."""
    return f" (rank {value_R.index(max(value_R))})" if len(value_R) > 1 else ""
