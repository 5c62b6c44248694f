"""Building a config's model: a timm image classifier, or one of mmseg's segmentation models."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from spt_dist.errors import UserError
from spt_dist.models.checkpoints import load_backbone
from spt_dist.models.matrices import find_heads
from spt_dist.models.projections import call_projections
from spt_dist.models.sharded import fill

SEGMENTOR = "mmseg.EncoderDecoder"


def build_classifier(
    name: str,
    num_classes: int,
    kwargs: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    seed: int = 0,
    keep_head: bool = False,
) -> nn.Module:
    """Build a model, load its backbone and give it a fresh head, or the checkpoint's.

    Args:
        name: timm's model name, or "mmseg.EncoderDecoder".
        num_classes: outputs of the head.
        kwargs: further arguments of ``timm.create_model`` (``img_size``, ``patch_size``, ``embed_dim`` ...), or those
            of mmseg's EncoderDecoder (``backbone``, ``decode_head``, ...).
        checkpoint: pre-trained backbone, see ``load_backbone``; ``None`` leaves the random initialisation.
        seed: for the random initialisation, the head's included; the same on every rank gives the same model.
        keep_head: whether the head is loaded from the checkpoint too.

    Returns:
        The model in training mode, fp32, on the CPU.

    Raises:
        UserError: there is no such model, an argument is refused, or the checkpoint does not fit.
    """
    model = create_model(name, num_classes, kwargs, torch.device("cpu"), seed)
    fill_head(model, seed)
    if checkpoint is not None:
        load_backbone(model, checkpoint, keep_head)
    return model


def create_model(
    name: str, num_classes: int, kwargs: dict[str, Any] | None, device: torch.device, seed: int = 0
) -> nn.Module:
    """The model with random weights; without any on torch's meta device.

    Raises:
        UserError: there is no such model, or an argument is refused; mmseg is wanted and not installed.
    """
    if name == SEGMENTOR:
        return _create_segmentor(num_classes, kwargs or {}, device, seed)
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise UserError(
            f"model.name={name!r}: timm has no such model; some it has: {', '.join(close) or 'see timm.list_models()'} "
            f"({SEGMENTOR!r} is for segmentation)"
        )
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, num_classes=num_classes, **(kwargs or {}))
        # timm checks its arguments with whatever is at hand: assertions, and torch's own errors.
        except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
            raise UserError(f"model.kwargs={kwargs!r}: {error}") from error
    call_projections(model)
    return model


def _create_segmentor(num_classes: int, settings: dict[str, Any], device: torch.device, seed: int) -> nn.Module:
    try:
        from spt_dist.models.segmentor import create_segmentor
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("mmseg", "mmcv", "ftfy"):
            raise
        raise UserError(
            f"model.name={SEGMENTOR!r} needs {error.name.split('.')[0]}, which is not installed: "
            "pip install 'spt_dist[segmentation]'"
        ) from error
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(seed)
        return create_segmentor(num_classes, settings)


def fill_head(model: nn.Module, seed: int) -> None:
    """Give the model a fresh head, in place."""
    state = model.state_dict(keep_vars=True)
    for name, value in head_values(model, seed).items():
        fill(state[name], value)


def head_values(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A fresh head: name -> value on the CPU of its parameters and buffers.

    A classifier's matrices come from N(0, 0.02), as timm draws ViT's, and biases are zero; a segmentor draws its own.
    They depend on the seed alone, so that a model that was never whole in one place gets the same head.
    """
    draw_head = getattr(model, "draw_head", None)
    if callable(draw_head):
        drawn: dict[str, Tensor] = draw_head(seed)
        return drawn
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for head in find_heads(model):
        for name, parameter in model.get_submodule(head).named_parameters(head):
            values[name] = torch.zeros(parameter.shape)
            if parameter.ndim > 1:
                nn.init.trunc_normal_(values[name], std=0.02, generator=generator)
    return values
