"""What the trainer needs from a way of training on several ranks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spt_dist.models.sharded import whole_shape
from spt_dist.tuning.inject import trainable_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, Tensor]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as published for SPT.

    Attributes:
        lr: learning rate until ``Engine.set_lr`` is called.
        weight_decay: on matrices and prompts only.
        clip_norm: largest gradient norm, ``None`` for no clipping.
        accumulation: backward passes in a step.
    """

    lr: float
    weight_decay: float
    clip_norm: float | None = None
    accumulation: int = 1


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
    def __call__(self, inputs: Tensor) -> Tensor:
        """Forward pass, under autocast if the engine was told so."""

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

        Beside them are ``optimizer/step``, the number of updates, and ``scaler/...`` with float16. Moments are left out
        before the first update. Other ranks get an empty dict.
        """

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``gather_state`` returned on rank 0, here given to every rank. Collective."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @abstractmethod
    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole fp32 value of each trained parameter, one at a time, on every rank. Collective."""

    def trainable_values(self) -> State:
        """All of ``trained``, on the CPU of rank 0; empty on the others. Collective."""
        return keep_on_rank_0(self.trained())


def build_adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: matrices and prompts with weight decay; all else without.

    Raises:
        ValueError: from torch, if the model has no trainable parameter.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in trainable_parameters(model):
        (decayed if len(whole_shape(parameter)) == 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    # An empty group makes DeepSpeed's ZeRO fail.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, eps=1e-8)


def keep_on_rank_0(values: Iterator[tuple[str, Tensor]]) -> State:
    """Copies on the CPU of rank 0 of what comes by on every rank."""
    kept = {}
    for name, value in values:
        if dist.get_rank() == 0:
            kept[name] = value.detach().to("cpu", torch.float32, copy=True)
    return kept
