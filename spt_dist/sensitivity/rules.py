"""Per-sample squared gradients of each kind of layer, from the layer's input and its output gradient.

One rule a kind: ``rule(module, inputs, grads, num_samples, scores)`` adds to ``scores[parameter]``, an fp32 tensor in
the shape of the module's parameter, the sum over samples of the squared gradient of that sample's loss. Samples lie
along the outermost axis; further rows of a sample there (windows of attention) count as positions, as every other
leading axis does. With ``num_samples=1`` the whole batch counts as one sample: the square of the batch's gradient.

Shape suffixes: B samples, T positions, I in_features, O out_features, D normalised features, C channels, H W height and
width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from spt_dist.models.layers import layer_kind
from spt_dist.sensitivity.depthwise import depthwise_gradients
from spt_dist.sensitivity.kernels import add_squared_gradients

Rule = Callable[[nn.Module, Tensor, Tensor, int, Mapping[str, Tensor]], None]


def find_rule(module: nn.Module) -> Rule | None:
    """The rule that scores this module's parameters, or ``None``."""
    kind = layer_kind(module)
    return None if kind is None else _RULES[kind]


def score_linear(
    module: nn.Module, inputs: Tensor, grads: Tensor, num_samples: int, scores: Mapping[str, Tensor]
) -> None:
    """Rule for ``y = x W^T + b``: ``dE_i/dW = sum_t d_it x_it^T``, ``dE_i/db = sum_t d_it``."""
    inputs_BTI = inputs.reshape(num_samples, -1, inputs.shape[-1])
    grads_BTO = grads.reshape(num_samples, -1, grads.shape[-1])
    if "weight" in scores:
        add_squared_gradients(scores["weight"], inputs_BTI, grads_BTO)
    if "bias" in scores:
        _add_squares(scores["bias"], grads_BTO)


def score_conv2d(
    module: nn.Module, inputs: Tensor, grads: Tensor, num_samples: int, scores: Mapping[str, Tensor]
) -> None:
    """Rule for a convolution, ``y_t = W p_t(x) + b`` with ``p_t(x)`` the patch of ``x`` under the kernel at ``t``."""
    assert isinstance(module, nn.Conv2d)
    if "weight" in scores:
        if _cuts_into_patches(module, inputs):
            weight_OI = scores["weight"].view(len(scores["weight"]), -1)
            patches_BTI = _patches(inputs, module.kernel_size).reshape(num_samples, -1, weight_OI.shape[1])
            grads_BTO = grads.movedim(1, -1).reshape(num_samples, -1, len(weight_OI))
            add_squared_gradients(weight_OI, patches_BTI, grads_BTO)
        else:
            _add_convolved(module, inputs, grads, num_samples, scores["weight"])
    if "bias" in scores:
        _add_squares(scores["bias"], grads.movedim(1, -1).reshape(num_samples, -1, grads.shape[1]))


def score_layer_norm(
    module: nn.Module, inputs: Tensor, grads: Tensor, num_samples: int, scores: Mapping[str, Tensor]
) -> None:
    """Rule for ``y = g * n(x) + b``: ``dE_i/dg = sum_t d_it * n(x_it)``, ``dE_i/db = sum_t d_it``."""
    assert isinstance(module, nn.LayerNorm)
    if num_samples == 1:
        _add_squares_of_whole(module, inputs, grads, scores)
        return
    if "weight" in scores:
        size = scores["weight"].numel()
        normalised = F.layer_norm(inputs.float(), module.normalized_shape, eps=module.eps)
        _add_squares(scores["weight"].view(-1), normalised.mul_(grads).reshape(num_samples, -1, size))
    if "bias" in scores:
        _add_squares(scores["bias"].view(-1), grads.reshape(num_samples, -1, scores["bias"].numel()))


def score_layer_norm_2d(
    module: nn.Module, inputs: Tensor, grads: Tensor, num_samples: int, scores: Mapping[str, Tensor]
) -> None:
    """Rule for a layer norm over the channels of ``(B, C, H, W)``."""
    score_layer_norm(module, inputs.movedim(1, -1), grads.movedim(1, -1), num_samples, scores)


def score_group_norm(
    module: nn.Module, inputs: Tensor, grads: Tensor, num_samples: int, scores: Mapping[str, Tensor]
) -> None:
    """Rule for ``y_c = g_c * n(x)_c + b_c`` with ``n`` over groups of the channels of ``(B, C, ...)``."""
    assert isinstance(module, nn.GroupNorm)
    if "weight" in scores:
        products = F.group_norm(inputs.float(), module.num_groups, eps=module.eps).mul_(grads)
        _add_squares(scores["weight"], products.movedim(1, -1).reshape(num_samples, -1, products.shape[1]))
    if "bias" in scores:
        _add_squares(scores["bias"], grads.movedim(1, -1).reshape(num_samples, -1, grads.shape[1]))


_RULES: dict[str, Rule] = {
    "linear": score_linear,
    "conv2d": score_conv2d,
    "layer_norm": score_layer_norm,
    "layer_norm_2d": score_layer_norm_2d,
    "group_norm": score_group_norm,
}


def _add_squares(scores_D: Tensor, gradients_BTD: Tensor) -> None:
    scores_D += gradients_BTD.sum(dim=1, dtype=scores_D.dtype).square().sum(dim=0)


def _add_squares_of_whole(norm: nn.LayerNorm, inputs: Tensor, grads: Tensor, scores: Mapping[str, Tensor]) -> None:
    """Add the squared gradients of all rows together, by autograd's own function and so with its rounding.

    With criterion "batch" the scores are then those of published code bit for bit.
    """
    if not scores:
        return
    inputs, grads = inputs.float().contiguous(), grads.float().contiguous()
    _, mean, rstd = torch.native_layer_norm(inputs, norm.normalized_shape, None, None, norm.eps)
    # The gradients don't depend on the weight's values, which an engine may have taken away by now.
    shape_only = torch.empty(norm.normalized_shape, device=inputs.device)
    _, weight, bias = torch.ops.aten.native_layer_norm_backward(
        grads, inputs, norm.normalized_shape, mean, rstd, shape_only, shape_only, [False, True, True]
    )
    for name, gradient in (("weight", weight), ("bias", bias)):
        if name in scores:
            scores[name] += gradient.square_()


def _cuts_into_patches(conv: nn.Conv2d, inputs_BCHW: Tensor) -> bool:
    """Whether the kernel tiles the image, so that patches are a mere rearrangement (patch embedding, 1x1)."""
    fits = all(size % kernel == 0 for size, kernel in zip(inputs_BCHW.shape[2:], conv.kernel_size, strict=True))
    no_padding = not any(conv._reversed_padding_repeated_twice)
    return fits and no_padding and conv.groups == 1 and conv.stride == conv.kernel_size and conv.dilation == (1, 1)


def _patches(inputs_BCHW: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """``(B, C, H, W)`` to ``(B, H/h, W/w, C, h, w)``."""
    batch, channels, height, width = inputs_BCHW.shape
    h, w = kernel
    return inputs_BCHW.reshape(batch, channels, height // h, h, width // w, w).permute(0, 2, 4, 1, 3, 5)


def _add_convolved(conv: nn.Conv2d, inputs: Tensor, grads: Tensor, num_samples: int, scores_OChw: Tensor) -> None:
    """Add each sample's squared weight gradient, by torch's own gradient of one sample's convolution."""
    inputs, grads = inputs.to(scores_OChw.dtype), grads.to(scores_OChw.dtype)
    is_depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.stride == (1, 1)
    # One sample alone keeps the rounding of autograd's own function, as in code that squares a batch's gradient.
    if is_depthwise and num_samples > 1:
        kernel, dilation = scores_OChw.shape[2:], conv.dilation
        gradients = depthwise_gradients(_pad(conv, inputs), grads, (kernel[0], kernel[1]), (dilation[0], dilation[1]))
        scores_OChw += gradients.view(num_samples, -1, *scores_OChw.shape).sum(dim=1).square_().sum(dim=0)
        return
    padding = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros":
        inputs, padding = _pad(conv, inputs), (0, 0)
    for some_inputs, some_grads in zip(inputs.chunk(num_samples), grads.chunk(num_samples), strict=True):
        gradient = conv2d_weight(
            some_inputs,
            list(scores_OChw.shape),
            some_grads,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
        )
        scores_OChw.addcmul_(gradient, gradient)


def _pad(conv: nn.Conv2d, inputs_BCHW: Tensor) -> Tensor:
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(inputs_BCHW, conv._reversed_padding_repeated_twice, mode=mode)
