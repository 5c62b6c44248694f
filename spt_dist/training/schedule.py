"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to ``min_lr`` at the last step.

    Attributes:
        lr: peak.
        min_lr: at the end.
        warmup_lr: at step 0, if there are warm-up steps.
        warmup_steps: steps of the warm-up.
        total_steps: steps of the run, warm-up included.
    """

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
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2
