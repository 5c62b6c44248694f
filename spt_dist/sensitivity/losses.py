"""The loss that scores refer to, from whatever reduction the user's loss function has."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.sensitivity.nested import check_separable, take

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
    losses = _losses(loss_fn, outputs, targets, num_samples)
    if losses.ndim == 1 or num_samples == 1:
        return losses.sum()
    # A scalar may be a mean, a sum or weighted: applied to one sample at a time it is that sample's own loss.
    return torch.stack(_one_by_one(loss_fn, outputs, targets, num_samples)).sum()


def mean_loss(loss_fn: LossFunction, outputs: Any, targets: Any, num_samples: int) -> Tensor:
    """The mean loss of a batch: a scalar as ``loss_fn`` returns it, unless that is the sum over the samples.

    Args:
        loss_fn, outputs, targets, num_samples: as in ``summed_loss``.

    Raises:
        UserError: as ``summed_loss``.
    """
    losses = _losses(loss_fn, outputs, targets, num_samples)
    if losses.ndim == 1 or num_samples == 1:
        return losses.mean()
    with torch.no_grad():
        total = torch.stack(_one_by_one(loss_fn, outputs, targets, num_samples)).sum()
    return losses / num_samples if torch.isclose(losses, total, rtol=1e-4) else losses


def _losses(loss_fn: LossFunction, outputs: Any, targets: Any, num_samples: int) -> Tensor:
    """What ``loss_fn`` returns: a scalar, or one value a sample."""
    losses = loss_fn(outputs, targets)
    if not isinstance(losses, Tensor) or not losses.requires_grad:
        raise UserError(
            f"loss_fn returned {type(losses).__name__} that does not depend on the model's layers; it has to return a "
            "tensor computed from the outputs, with gradients"
        )
    if losses.ndim != 0 and losses.shape != (num_samples,):
        raise UserError(
            f"loss_fn returned shape {tuple(losses.shape)} for {num_samples} samples; "
            "it has to return a scalar or one value a sample"
        )
    return losses


def _one_by_one(loss_fn: LossFunction, outputs: Any, targets: Any, num_samples: int) -> list[Tensor]:
    """Each sample's own loss."""
    try:
        check_separable(outputs)
        check_separable(targets)
    except UserError as error:
        raise UserError(
            f"loss_fn returned one value for {num_samples} samples, so it is applied to one sample at a time; but in "
            f"its arguments {error}. Let loss_fn return one loss a sample, or pass micro_batch=1"
        ) from error
    rows = [slice(i, i + 1) for i in range(num_samples)]
    return [loss_fn(take(outputs, row), take(targets, row)) for row in rows]
