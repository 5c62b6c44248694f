"""Sums of squared per-sample weight gradients, formed without ever holding one per sample.

Shape suffixes: B samples, T positions within a sample (tokens), I in_features, O out_features.
"""

import torch
from torch import Tensor


def add_squared_gradients(scores_OI: Tensor, inputs_BTI: Tensor, grads_BTO: Tensor) -> None:
    """Add each sample's squared weight gradient of ``y = x W^T`` to the scores, in place.

    ``S += sum_b (sum_t d_bt x_bt^T)^2`` with the square taken element by element after the sum over the
    positions of one sample: a sample's gradient is the sum over its tokens (SPT, Algorithm 1).

    Args:
        scores_OI: fp32 accumulator, changed in place.
        inputs_BTI: the layer's inputs, any floating dtype.
        grads_BTO: gradients of the summed loss with respect to the layer's outputs, any floating dtype.
    """
    gradient_OI = torch.empty_like(scores_OI)
    inputs_BTI, grads_BTO = inputs_BTI.to(scores_OI.dtype), grads_BTO.to(scores_OI.dtype)
    for inputs_TI, grads_TO in zip(inputs_BTI, grads_BTO, strict=True):
        torch.mm(grads_TO.mT, inputs_TI, out=gradient_OI)
        scores_OI.addcmul_(gradient_OI, gradient_OI)
