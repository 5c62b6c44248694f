"""The state a model is in while it is scored, and its way back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.models.sharded import is_sharded


@contextmanager
def scoring_mode(model: nn.Module, train_mode: bool) -> Iterator[None]:
    """All weights frozen, in training or eval mode, with gradients on; everything put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gathered: list[Tensor] = []

    def freeze_gathered(module: nn.Module, _: Any) -> None:
        # FSDP2 keeps whole parameters of its own beside the sharded ones and shows them while a module runs.
        found = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        gathered.extend(parameter.requires_grad_(False) for parameter in found)

    shown = model.modules() if is_sharded(model) else []
    handles = [module.register_forward_pre_hook(freeze_gathered) for module in shown]
    model.requires_grad_(False).train(train_mode)
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in [*trainable, *gathered]:
            parameter.requires_grad_(True)
        for module, was_training in modes.items():
            module.training = was_training
