"""Per-sample squared gradients of each layer type, from the layer's input and its output gradient.

One rule a layer type: ``rule(module, inputs, grads, num_samples, scores)`` adds to ``scores[parameter]``, an fp32
tensor in the shape of the module's parameter, the sum over samples of the squared gradient of that sample's loss.
Samples lie along the outermost axis; every other leading axis counts as positions of one sample.

Shape suffixes: B samples, T positions, I in_features, O out_features, D normalised features.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.models.matrices import is_layer_norm, is_linear
from spt_dist.sensitivity.kernels import add_squared_gradients

Rule = Callable[[nn.Module, Tensor, Tensor, int, Mapping[str, Tensor]], None]


def find_rule(module: nn.Module) -> Rule | None:
    """The rule that scores this module's parameters, or ``None``."""
    if is_linear(module):
        return score_linear
    if is_layer_norm(module):
        return score_layer_norm
    return None


def score_linear(
    module: nn.Module, inputs: Tensor, grads: Tensor, num_samples: int, scores: Mapping[str, Tensor]
) -> None:
    """Rule for ``y = x W^T + b``: ``dE_i/dW = sum_t d_it x_it^T``, ``dE_i/db = sum_t d_it``."""
    inputs_BTI = inputs.reshape(num_samples, -1, inputs.shape[-1])
    grads_BTO = grads.reshape(num_samples, -1, grads.shape[-1])
    add_squared_gradients(scores["weight"], inputs_BTI, grads_BTO)
    if "bias" in scores:
        _add_squares(scores["bias"], grads_BTO)


def score_layer_norm(
    module: nn.Module, inputs: Tensor, grads: Tensor, num_samples: int, scores: Mapping[str, Tensor]
) -> None:
    """Rule for ``y = g * n(x) + b``: ``dE_i/dg = sum_t d_it * n(x_it)``, ``dE_i/db = sum_t d_it``."""
    assert isinstance(module, nn.LayerNorm)
    shape = module.normalized_shape
    if "weight" in scores:
        normalised = F.layer_norm(inputs.float(), shape, eps=module.eps)
        _add_squares(scores["weight"].view(-1), (normalised * grads).reshape(num_samples, -1, scores["weight"].numel()))
    if "bias" in scores:
        _add_squares(scores["bias"].view(-1), grads.reshape(num_samples, -1, scores["bias"].numel()))


def _add_squares(scores_D: Tensor, gradients_BTD: Tensor) -> None:
    scores_D += gradients_BTD.to(scores_D.dtype).sum(dim=1).square().sum(dim=0)
