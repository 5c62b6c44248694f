"""The loss that scores refer to, from whatever reduction the user's loss function has."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.sensitivity.nested import take

LossFunction = Callable[[Any, Any], Tensor]


def summed_loss(loss_fn: LossFunction, outputs: Any, targets: Any, num_samples: int) -> Tensor:
    """Sum over the samples of each one's own loss, whatever reduction ``loss_fn`` uses.

    Args:
        loss_fn: returns a scalar or one value a sample.
        outputs, targets: its arguments, samples along axis 0.
        num_samples: how many there are.

    Raises:
        UserError: ``loss_fn`` returns something else, or a constant.
    """
    losses = loss_fn(outputs, targets)
    if not isinstance(losses, Tensor) or not losses.requires_grad:
        raise UserError(
            f"loss_fn returned {type(losses).__name__} that does not depend on the model's layers; it has to return a "
            "tensor computed from the outputs, with gradients"
        )
    if losses.ndim == 1 and len(losses) == num_samples:
        return losses.sum()
    if losses.ndim != 0:
        raise UserError(
            f"loss_fn returned shape {tuple(losses.shape)} for {num_samples} samples; "
            "it has to return a scalar or one value a sample"
        )
    if num_samples == 1:
        return losses
    # A scalar may be a mean, a sum or weighted: applied to one sample at a time it is that sample's own loss.
    rows = [slice(i, i + 1) for i in range(num_samples)]
    return torch.stack([loss_fn(take(outputs, row), take(targets, row)) for row in rows]).sum()
