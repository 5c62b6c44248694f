"""Optimizers over what is trained: AdamW as published for SPT, and SGD as mmseg trains SETR."""

from dataclasses import dataclass

import torch
from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.models.sharded import whole_shape
from spt_dist.sections import TrainConfig
from spt_dist.tuning.inject import trainable_parameters

# What each optimizer remembers of a parameter.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer of a run.

    Attributes:
        lr: learning rate until ``Engine.set_lr`` is called.
        weight_decay: on matrices and prompts only.
        clip_norm: largest gradient norm, ``None`` for no clipping.
        accumulation: backward passes in a step.
        optimizer: "adamw" or "sgd".
        momentum: of SGD.
        separate_head: whether the head has a learning rate of its own.
    """

    lr: float
    weight_decay: float
    clip_norm: float | None = None
    accumulation: int = 1
    optimizer: str = "adamw"
    momentum: float = 0.9
    separate_head: bool = False

    @property
    def moments(self) -> tuple[str, ...]:
        """What the optimizer remembers of a parameter."""
        return () if self.optimizer == "sgd" and self.momentum == 0 else MOMENTS[self.optimizer]


def optimizer_settings(train: TrainConfig) -> OptimizerSettings:
    """What a config says about the optimizer."""
    return OptimizerSettings(
        lr=train.lr,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        accumulation=train.accumulation,
        optimizer=train.optimizer,
        momentum=train.momentum,
        separate_head=train.head_lr_mult != 1,
    )


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters: matrices, kernels and prompts with weight decay; all else without.

    Its groups have ``is_head``, where the head has a learning rate of its own.

    Raises:
        ValueError: from torch, if the model has no trainable parameter.
    """
    plan = model.spt_plan
    assert isinstance(plan, Plan)
    head = set(plan.head)
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {(h, d): [] for h in (False, True) for d in (True, False)}
    for name, parameter in trainable_parameters(model):
        is_apart = settings.separate_head and name in head
        members[is_apart, _is_decayed(parameter, name in head)].append(parameter)
    # An empty group makes DeepSpeed's ZeRO fail.
    groups = [
        {"params": parameters, "weight_decay": settings.weight_decay if decayed else 0.0, "is_head": is_head}
        for (is_head, decayed), parameters in members.items()
        if parameters
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.lr, eps=1e-8)


def _is_decayed(parameter: nn.Parameter, is_in_head: bool) -> bool:
    """Matrices; kernels of a head's convolutions too."""
    num_axes = len(whole_shape(parameter))
    return num_axes == 2 or (is_in_head and num_axes == 4)
