"""What the trainer needs from a way of training on several ranks."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.tuning.inject import trainable_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as published for SPT.

    Attributes:
        lr: learning rate until ``Engine.set_lr`` is called.
        weight_decay: on matrices and prompts only.
        clip_norm: largest gradient norm, ``None`` for no clipping.
    """

    lr: float
    weight_decay: float
    clip_norm: float | None = None


class Engine(ABC):
    """A tuned model, its optimizer, and how both are spread over the ranks.

    Gradients are averaged over the ranks. The state that ``gather_state`` returns is engine-neutral: any engine on
    any number of ranks can load it.
    """

    module: nn.Module
    optimizer: Any

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """Forward pass, under autocast if the engine was told so."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backward pass of this rank's loss."""

    @abstractmethod
    def step(self) -> float:
        """Clip, update the parameters and drop the gradients; returns the gradient's norm before clipping."""

    @abstractmethod
    def gather_state(self) -> dict[str, Tensor]:
        """Whole fp32 parameters (``param/NAME``) and moments (``exp_avg/NAME``, ...) on the CPU. Collective.

        The moments are left out before the first step.
        """

    @abstractmethod
    def load_state(self, state: dict[str, Tensor], num_steps: int) -> None:
        """Take over what ``gather_state`` returned after ``num_steps`` optimizer steps. Collective."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def trainable_values(self) -> dict[str, Tensor]:
        """Name -> whole fp32 value of every trained parameter, on the CPU. Collective."""
        return {
            name[len("param/") :]: value for name, value in self.gather_state().items() if name.startswith("param/")
        }


def build_adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: matrices and prompts with weight decay; all else without.

    Raises:
        ValueError: from torch, if the model has no trainable parameter.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in trainable_parameters(model):
        (decayed if parameter.ndim == 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    # An empty group makes DeepSpeed's ZeRO fail.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, eps=1e-8)
