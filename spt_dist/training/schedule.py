"""The learning rate as a function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from spt_dist.sections import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a fall from ``lr`` to ``min_lr`` at the last step.

    Attributes:
        fall: share of the way down, 0 to 1 -> share of ``lr - min_lr`` that is left, 1 to 0.
        lr: peak.
        min_lr: at the end.
        warmup_lr: at step 0, if there are warm-up steps.
        warmup_steps: steps of the warm-up.
        total_steps: steps of the run, warm-up included.
    """

    fall: Callable[[float], float]
    lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        rest = max(1, self.total_steps - self.warmup_steps - 1)
        progress = min(1.0, (step - self.warmup_steps) / rest)
        return self.min_lr + (self.lr - self.min_lr) * self.fall(progress)


def cosine(progress: float) -> float:
    """Half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Poly:
    """A power of what is left, as mmseg's schedules fall."""

    power: float

    def __call__(self, progress: float) -> float:
        return float((1 - progress) ** self.power)


def make_schedule(train: TrainConfig, factor: float, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The schedule of a config.

    Args:
        train: what it says.
        factor: of the peak and of the warm-up's first rate (the head's); the rate at the end is the same for all, as
            in mmengine's PolyLR.
        steps_per_epoch: global batches in an epoch.
        total_steps: steps of the run.
    """
    unit = steps_per_epoch if train.iterations is None else 1
    return Schedule(
        fall=Poly(train.poly_power) if train.schedule == "poly" else cosine,
        lr=factor * train.lr,
        min_lr=train.min_lr,
        warmup_lr=factor * train.warmup_lr,
        warmup_steps=round(train.warmup_epochs * unit),
        total_steps=total_steps,
    )
