"""A moving average of what is trained, to be evaluated and saved in its place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spt_dist.models.matrices import head_buffers
from spt_dist.models.sharded import fill, whole_value
from spt_dist.tuning.inject import trainable_parameters

_PREFIX = "ema/"


class MovingAverage:
    """``average = decay * average + (1 - decay) * value`` after each step, in fp32, on the values' devices.

    Each rank averages what it holds; of sharded parameters its own rows.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._values: dict[str, Tensor] = dict(trainable_parameters(module)) | head_buffers(module)
        self._decay = decay
        self._averages = {name: value.detach().clone() for name, value in self._values.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the values after a step."""
        for name, average in self._averages.items():
            average.lerp_(self._values[name].detach(), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages into the model for the length of the block."""
        values = {name: value.detach().clone() for name, value in self._values.items()}
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(values)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._values[name].copy_(value)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole average of each parameter and of the head's running means, one at a time. Collective."""
        for name, average in self._averages.items():
            yield name, whole_value(average)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The averages for a checkpoint. Collective."""
        return ((_PREFIX + name, average) for name, average in self.whole())

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the averages of a checkpoint; of one without any, the parameters' values as they are."""
        for name, average in self._averages.items():
            if _PREFIX + name in state:
                fill(average, state[_PREFIX + name])
            else:
                average.copy_(self._values[name].detach())
