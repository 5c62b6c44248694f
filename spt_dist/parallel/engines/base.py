"""What the trainer needs from a way of training on several ranks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spt_dist.models.matrices import head_buffers

State = dict[str, Tensor]
_BUFFER_PREFIX = "buffer/"


class Engine(ABC):
    """A tuned model, its optimizer, and how both are spread over the ranks.

    Gradients are averaged over the ranks. The state that ``gather_state`` returns is engine-neutral: any engine on
    any number of ranks can load it.

    Attributes:
        module: the model itself.
        optimizer: with ``param_groups``.
    """

    module: nn.Module
    optimizer: Any

    @property
    @abstractmethod
    def skips_overflow(self) -> bool:
        """Whether a step whose gradients are not finite is left out: float16 scales its loss too high now and then."""

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Any:
        """Forward pass of ``(B, C, H, W)``: a tensor, or a tuple of them; under autocast if the engine was told so."""

    def passing(self, is_last: bool) -> AbstractContextManager[None]:
        """Goes around each forward and backward pass of a step; gradients are exchanged in the last one."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backward pass of this rank's loss."""

    @abstractmethod
    def step(self) -> float:
        """Clip, update the parameters and drop the gradients; returns the gradient's norm before clipping.

        With float16 a step whose gradients overflow is left out, and the loss is scaled less from then on.
        """

    @abstractmethod
    def gather_state(self) -> State:
        """Whole fp32 parameters (``param/NAME``) and moments (``exp_avg/NAME``, ...) on the CPU of rank 0. Collective.

        Beside them are ``buffer/NAME``, the head's running means; ``optimizer/step``, AdamW's number of updates; and
        ``scaler/...`` with float16. Moments are left out before the first update. Other ranks get an empty dict.
        """

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``gather_state`` returned on rank 0, here given to every rank. Collective."""

    def set_lr(self, lr: float, head_lr: float) -> None:
        """Set the learning rate of every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = head_lr if group["is_head"] else lr

    @abstractmethod
    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole fp32 value of each trained parameter, one at a time, on every rank. Collective."""

    def trainable_values(self) -> State:
        """All of ``trained`` and the head's buffers, on the CPU of rank 0; empty on the others. Collective."""
        return keep_on_rank_0(chain(self.trained(), head_buffers(self.module).items()))


def read_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The head's buffers as a checkpoint names them."""
    return ((_BUFFER_PREFIX + name, buffer) for name, buffer in head_buffers(module).items())


@torch.no_grad()
def write_buffers(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take over the head's buffers from a checkpoint."""
    for name, buffer in head_buffers(module).items():
        buffer.copy_(state[_BUFFER_PREFIX + name])


def keep_on_rank_0(values: Iterator[tuple[str, Tensor]]) -> State:
    """Copies on the CPU of rank 0 of what comes by on every rank."""
    kept = {}
    for name, value in values:
        if dist.get_rank() == 0:
            kept[name] = value.detach().to("cpu", torch.float32, copy=True)
    return kept
