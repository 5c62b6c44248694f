"""Sums of squared per-sample weight gradients, formed without ever holding one per sample.

Shape suffixes: B samples, T positions within a sample (tokens), I in_features, O out_features.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def add_squared_gradients(scores_OI: Tensor, inputs_BTI: Tensor, grads_BTO: Tensor) -> None:
    """Add each sample's squared weight gradient of ``y = x W^T`` to the scores, in place.

    ``S += sum_b (sum_t d_bt x_bt^T)^2`` with the square taken element by element after the sum over the
    positions of one sample: a sample's gradient is the sum over its tokens (SPT, Algorithm 1).

    On a GPU a fused Triton kernel does it where Triton can run; everywhere else one GEMM a sample.

    Args:
        scores_OI: fp32 accumulator, changed in place.
        inputs_BTI: the layer's inputs, any floating dtype. They are rounded to the dtype of the gradients, which is
            the layer's own: under autocast the layer multiplied with inputs rounded just so.
        grads_BTO: gradients of the summed loss with respect to the layer's outputs, any floating dtype.
    """
    inputs_BTI = inputs_BTI.to(grads_BTO.dtype)
    if inputs_BTI.shape[1] == 1:
        _add_squared_outer_products(scores_OI, inputs_BTI[:, 0], grads_BTO[:, 0])
    elif scores_OI.is_cuda and (fused := _fused_kernel(scores_OI.device)):
        fused(scores_OI, inputs_BTI, grads_BTO)
    else:
        _add_one_by_one(scores_OI, inputs_BTI, grads_BTO)


def _add_one_by_one(scores_OI: Tensor, inputs_BTI: Tensor, grads_BTO: Tensor) -> None:
    """The portable path: one GEMM a sample into a reused buffer, squared into the scores."""
    gradient_OI = torch.empty_like(scores_OI)
    inputs_BTI, grads_BTO = inputs_BTI.to(scores_OI.dtype), grads_BTO.to(scores_OI.dtype)
    for inputs_TI, grads_TO in zip(inputs_BTI, grads_BTO, strict=True):
        torch.mm(grads_TO.mT, inputs_TI, out=gradient_OI)
        if len(inputs_BTI) == 1:
            # Rounded before it is added, as in code that squares a batch's gradient: the same scores bit for bit.
            scores_OI += gradient_OI.square_()
        else:
            scores_OI.addcmul_(gradient_OI, gradient_OI)


def _add_squared_outer_products(scores_OI: Tensor, inputs_BI: Tensor, grads_BO: Tensor) -> None:
    """With a single position ``(d x^T)^2 = d^2 (x^2)^T``: one GEMM for all samples."""
    grads_BO, inputs_BI = grads_BO.to(scores_OI.dtype), inputs_BI.to(scores_OI.dtype)
    # Squares of tiny gradients would vanish before they are multiplied: a power of two moves over to the inputs.
    _, exponents_B1 = torch.frexp(grads_BO.abs().amax(dim=1, keepdim=True))
    grads_BO, inputs_BI = torch.ldexp(grads_BO, -exponents_B1), torch.ldexp(inputs_BI, exponents_B1)
    scores_OI.addmm_(grads_BO.square().mT, inputs_BI.square())


@cache
def _fused_kernel(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """The Triton kernel, or ``None`` where it can't run. Logs which."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        logger.info("scoring with one GEMM a sample: the Triton kernel needs compute capability 8.0")
        return None
    try:
        from triton.runtime import driver

        driver.active.get_current_device()  # makes Triton compile its driver, which needs a C compiler
        from spt_dist.sensitivity.triton_kernels import add_squared_gradients as fused
    except Exception as error:  # whatever a missing package, compiler, header or library makes Triton raise
        logger.warning("scoring with one GEMM a sample, which is slower: Triton can't run here (%s)", error)
        return None
    logger.info("scoring with the fused Triton kernel")
    return fused
