"""Scores computed another way: one sample at a time, in float64, by ordinary autograd."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def one_by_one(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """``sum_i (dE_i/dw)^2`` for each of the model's own parameters, float64."""
    return squared_gradients(model, [(inputs[i : i + 1], targets[i : i + 1]) for i in range(len(inputs))], loss_fn)


def squared_gradients(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """Sum over batches of the squared gradient of the batch's loss, float64."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    totals = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for inputs, targets in batches:
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        names, parameters = zip(*model.named_parameters(), strict=True)
        loss = loss_fn(model(inputs), targets).sum()
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                totals[name] += gradient.square()
    return totals


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest deviation, relative to the largest wanted value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))
