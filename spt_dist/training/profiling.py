"""Recording a few steps: torch's profiler, and the GPU's allocations."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from spt_dist.errors import UserError
from spt_dist.files import write_atomically
from spt_dist.sections import LogConfig

logger = logging.getLogger(__name__)

# Steps before the recorded ones: kernels are chosen, blocks compiled and memory pools filled in the first.
WARM_UP_STEPS = 3
# Allocations and frees that a snapshot holds at most: some hundred steps of a large model.
_MAX_ALLOCATIONS = 1_000_000


def check_profile(log: LogConfig) -> None:
    """Refuse what could not be recorded, before anything is built.

    Raises:
        UserError: a memory snapshot without a GPU, or without steps to record.
    """
    if log.memory_snapshot and not torch.cuda.is_available():
        raise UserError("config: log.memory_snapshot=True records a GPU's memory, and there is no GPU; leave it out")
    if log.memory_snapshot and not log.profile_steps:
        raise UserError("config: log.memory_snapshot=True, but log.profile_steps=0 says to record no step; set it to 5")


class StepProfiler:
    """Records some steps of this rank; made by ``profiled_steps``."""

    def __init__(self, log: LogConfig, work_dir: Path, rank: int) -> None:
        self._wanted, self._with_memory = log.profile_steps, log.memory_snapshot
        self._trace_path = work_dir / "logs" / f"trace-rank-{rank}.json.gz"
        self._memory_path = work_dir / "logs" / f"memory-rank-{rank}.pickle"
        self._steps = 0
        self._profiler: profile | None = None
        if self._wanted:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            # In its own warm-up the profiler is on already, so that starting it is not part of the first recorded step.
            steps = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=self._wanted, repeat=1)
            self._profiler = profile(activities=activities, schedule=steps, record_shapes=True)
            self._profiler.start()

    def step(self) -> None:
        """A step is over; after the last one to be recorded the files are written."""
        if self._profiler is None:
            return
        self._steps += 1
        if self._steps == WARM_UP_STEPS + self._wanted:
            self._finish(self._profiler)
        else:
            self._profiler.step()
            if self._steps == WARM_UP_STEPS and self._with_memory:
                torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)

    def close(self) -> None:
        """Write what was recorded so far, if training ended early."""
        if self._profiler is None:
            return
        if self._steps > WARM_UP_STEPS:
            self._finish(self._profiler)
            return
        self._profiler.stop()
        self._profiler = None
        if self._with_memory:
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.warning("log.profile_steps=%d: training ended in the %d steps of warm-up", self._wanted, WARM_UP_STEPS)

    def _finish(self, profiler: profile) -> None:
        self._profiler = None
        profiler.stop()
        write_atomically(self._trace_path, lambda path: _export(profiler, path))
        recorded = self._steps - WARM_UP_STEPS
        logger.info("trace of %d steps: %s, to be opened at https://ui.perfetto.dev", recorded, self._trace_path)
        if self._with_memory:
            write_atomically(self._memory_path, lambda path: torch.cuda.memory._dump_snapshot(str(path)))
            torch.cuda.memory._record_memory_history(enabled=None)
            logger.info("memory of these steps: %s, for https://pytorch.org/memory_viz", self._memory_path)


@contextmanager
def profiled_steps(log: LogConfig, work_dir: Path, rank: int) -> Iterator[StepProfiler]:
    """Record ``log.profile_steps`` steps of the block, after three of warm-up, on each rank.

    The block calls ``step()`` at the end of each step. ``logs/trace-rank-N.json.gz`` in the work dir is then a trace
    for Perfetto, and with ``log.memory_snapshot`` ``logs/memory-rank-N.pickle`` every allocation on the GPU. Without
    ``log.profile_steps`` all this does nothing.
    """
    profiler = StepProfiler(log, work_dir, rank)
    # What was recorded up to an exception is written too: a snapshot shows why the memory did not suffice.
    try:
        yield profiler
    finally:
        profiler.close()


def _export(profiler: profile, path: Path) -> None:
    # The profiler compresses by the name's suffix, which a temporary name lacks.
    zipped = path.with_name(f"{path.name}.gz")
    profiler.export_chrome_trace(str(zipped))
    zipped.replace(path)
