"""Copies of a model that cost no memory for weights."""

import copy
from collections.abc import Collection

from torch import nn


def make_twin(model: nn.Module, but: Collection[str] = ()) -> nn.Module:
    """A copy of the modules that has the very parameters and buffers of ``model``.

    Args:
        model: stays as it is; replacing modules of the copy does not touch it.
        but: names of parameters that the copy gets copies of.
    """
    shared = [parameter for name, parameter in model.named_parameters() if name not in but]
    # What deepcopy is told to have copied already stays the same object in the copy.
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*shared, *model.buffers()]})
