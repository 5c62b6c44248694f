"""Building a timm image classifier from a config."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from spt_dist.errors import UserError
from spt_dist.models.checkpoints import load_backbone
from spt_dist.models.matrices import find_heads
from spt_dist.models.sharded import fill


def build_classifier(
    name: str,
    num_classes: int,
    kwargs: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build a timm model, load its backbone and give it a fresh head.

    Args:
        name: timm's model name.
        num_classes: outputs of the head.
        kwargs: further arguments of ``timm.create_model`` (``img_size``, ``patch_size``, ``embed_dim`` ...).
        checkpoint: pre-trained backbone, see ``load_backbone``; ``None`` leaves the random initialisation.
        seed: for the random initialisation, the head's included; the same on every rank gives the same model.

    Returns:
        The model in training mode, fp32, on the CPU.

    Raises:
        UserError: timm knows no such model or refuses an argument, or the checkpoint does not fit.
    """
    model = create_model(name, num_classes, kwargs, torch.device("cpu"), seed)
    for parameter_name, value in head_values(model, seed).items():
        fill(model.get_parameter(parameter_name), value)
    if checkpoint is not None:
        load_backbone(model, checkpoint)
    return model


def create_model(
    name: str, num_classes: int, kwargs: dict[str, Any] | None, device: torch.device, seed: int = 0
) -> nn.Module:
    """The timm model with random weights; without any on torch's meta device.

    Raises:
        UserError: timm knows no such model or refuses an argument.
    """
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise UserError(
            f"model.name={name!r}: timm has no such model; some it has: {', '.join(close) or 'see timm.list_models()'}"
        )
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(seed)
        try:
            return timm.create_model(name, num_classes=num_classes, **(kwargs or {}))
        # timm checks its arguments with whatever is at hand: assertions, and torch's own errors.
        except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
            raise UserError(f"model.kwargs={kwargs!r}: {error}") from error


def head_values(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A fresh head: name -> fp32 value on the CPU, matrices from N(0, 0.02), as timm draws ViT's, and biases of zero.

    They depend on the seed alone, so that a model that was never whole in one place gets the same head.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for head in find_heads(model):
        for name, parameter in model.get_submodule(head).named_parameters(head):
            values[name] = torch.zeros(parameter.shape)
            if parameter.ndim > 1:
                nn.init.trunc_normal_(values[name], std=0.02, generator=generator)
    return values
