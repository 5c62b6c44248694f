"""Frozen weights in a shorter format than fp32."""

from collections.abc import Collection

import torch
from torch import nn

from spt_dist.models.layers import is_linear
from spt_dist.models.matrices import find_heads, in_modules


def shorten_frozen(model: nn.Module, dtype: torch.dtype, trained: Collection[str] = ()) -> None:
    """Keep the weights of Linear layers in ``dtype``, in place; all else, and the head, stays fp32.

    Biases, norms and tokens are few, and are added to activations rather than multiplied with them.

    Args:
        model: on any device, torch's meta device too.
        dtype: bfloat16 or float16.
        trained: names of parameters that are trained in place, and stay fp32.
    """
    heads = find_heads(model)
    for name, module in model.named_modules():
        if is_linear(module) and not in_modules(name, heads) and f"{name}.weight" not in trained:
            weight = module.get_parameter("weight")
            weight.data = weight.data.to(dtype)
