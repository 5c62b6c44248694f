"""Which layers are what, told by the forward that runs: wrappers that only change a layer's class don't matter."""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn


def layer_kind(module: nn.Module) -> str | None:
    """What a layer computes, or ``None`` if it is none of those that are known.

    Returns:
        "linear", "conv2d", "layer_norm" (over the last axes), "layer_norm_2d" (over the channels of ``(B, C, H, W)``)
        or "group_norm". A subclass that keeps its base's ``forward`` (FSDP2 makes such) is of its base's kind; one with
        a ``forward`` of its own may compute something else.
    """
    return _kinds().get(type(module).forward)


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes exactly ``x W^T + b``."""
    return layer_kind(module) == "linear"


def matrix_kind(module: nn.Module) -> str | None:
    """How the module's ``weight``, seen as rows of one output each, is a matrix that can be updated as one.

    Returns:
        "linear"; "depthwise" for a convolution of each channel by itself, ``(out, height * width)`` of the kernel;
        "pointwise" for a 1 x 1 convolution of all channels without padding, ``(out, in)``; ``None`` for all else.
    """
    kind = layer_kind(module)
    if kind != "conv2d":
        return kind if kind == "linear" else None
    assert isinstance(module, nn.Conv2d)
    if module.groups == module.in_channels > 1:
        return "depthwise"
    is_padded = any(module._reversed_padding_repeated_twice)
    return "pointwise" if module.kernel_size == (1, 1) and module.groups == 1 and not is_padded else None


@cache
def _kinds() -> dict[Callable[..., Any], str]:
    from timm.layers import GroupNorm, GroupNorm1, LayerNorm, LayerNorm2d

    # timm's norms compute what torch's do; they only choose a faster kernel.
    return {
        nn.Linear.forward: "linear",
        nn.Conv2d.forward: "conv2d",
        nn.LayerNorm.forward: "layer_norm",
        LayerNorm.forward: "layer_norm",
        LayerNorm2d.forward: "layer_norm_2d",
        nn.GroupNorm.forward: "group_norm",
        GroupNorm.forward: "group_norm",
        GroupNorm1.forward: "group_norm",
    }
