"""When a run evaluates, saves and ends, in steps."""

from dataclasses import dataclass

from spt_dist.data.batches import GlobalBatches
from spt_dist.sections import TrainConfig

# Where a config does not say it.
EVAL_EPOCHS, SAVE_EPOCHS = 10, 5


@dataclass(frozen=True)
class Timetable:
    """A run's length and intervals.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        total_steps: steps of the run.
        eval_interval: steps between two evaluations.
        save_interval: steps between two checkpoints.
        extra_save_interval: the same, beside them; ``None`` for none.
    """

    steps_per_epoch: int
    total_steps: int
    eval_interval: int
    save_interval: int
    extra_save_interval: int | None

    @property
    def num_epochs(self) -> int:
        """Epochs begun."""
        return -(-self.total_steps // self.steps_per_epoch)

    def ends_epoch(self, step: int) -> bool:
        """Whether the epoch, or the run, is over after this many steps."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after this many steps."""
        return step % self.eval_interval == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this many steps."""
        is_extra = self.extra_save_interval is not None and step % self.extra_save_interval == 0
        return is_extra or step % self.save_interval == 0 or step == self.total_steps


def make_timetable(train: TrainConfig, batches: GlobalBatches) -> Timetable:
    """The timetable of a schedule over some batches. Its intervals are in epochs, or in steps with ``iterations``."""
    per_epoch = batches.steps_per_epoch
    if train.iterations is not None:
        unit, length, eval_interval, save_interval = 1, train.iterations, train.iterations, train.iterations
    else:
        assert train.epochs is not None, "one of the two is given"
        unit, length, eval_interval, save_interval = per_epoch, train.epochs, EVAL_EPOCHS, SAVE_EPOCHS
    return Timetable(
        steps_per_epoch=per_epoch,
        total_steps=length * unit,
        eval_interval=(train.eval_interval or eval_interval) * unit,
        save_interval=(train.checkpoint_interval or save_interval) * unit,
        extra_save_interval=train.checkpoint_steps,
    )
