"""Having the fused projections of timm's BEiT, EVA and Swin V2 run as layers.

Where query and value have biases of their own, the attention multiplies by the projection's weight itself, past
whatever watches the layer or stands in its place. With ``qkv_bias_separate`` it calls the layer, then adds the biases.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_SWITCH = "qkv_bias_separate"


def is_passed_by(attention: nn.Module) -> bool:
    """Whether ``attention`` reads the weight of its layer ``qkv`` and has no switch to call it instead."""
    return _has_own_biases(attention) and not hasattr(attention, _SWITCH)


def has_switches(model: nn.Module) -> bool:
    """Whether there is anything to switch: whoever builds the same model anew has to do so too."""
    return bool(_switchable(model))


def call_projections(model: nn.Module) -> None:
    """Switch the model, in place, for good; what it computes stays the same, but for rounding."""
    for attention in _switchable(model):
        setattr(attention, _SWITCH, True)


@contextmanager
def projections_called(model: nn.Module) -> Iterator[None]:
    """``call_projections`` for the length of the block."""
    before = [(attention, getattr(attention, _SWITCH)) for attention in _switchable(model)]
    call_projections(model)
    try:
        yield
    finally:
        for attention, was_called in before:
            setattr(attention, _SWITCH, was_called)


def _switchable(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _has_own_biases(module) and hasattr(module, _SWITCH)]


def _has_own_biases(attention: nn.Module) -> bool:
    return getattr(attention, "q_bias", None) is not None
