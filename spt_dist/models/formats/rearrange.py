"""How tensors of a file become a timm model's. Each result has memory of its own.

Shape suffixes: O out_features, I in_features, h, w pixels of a patch, N heads, d width of a head, D width of the model,
P positions.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor


def transposed(value_IO: Tensor) -> Tensor:
    """``(I, O)`` -> ``(O, I)``: a dense layer of JAX, or a matrix that is multiplied from the right."""
    return value_IO.t().contiguous()


def channels_first(kernel_hwIO: Tensor) -> Tensor:
    """``(h, w, I, O)`` -> ``(O, I, h, w)``: a convolution of JAX."""
    return kernel_hwIO.permute(3, 2, 0, 1).contiguous()


def patches_unrolled(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """``(O, h * w * I)``, what a linear layer multiplies the pixels of a patch by -> ``shape``: ``(O, I, h, w)``."""
    outputs, inputs, height, width = shape
    return lambda rows: rows.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2).contiguous()


def joined(*parts: Tensor) -> Tensor:
    """``(O, ...)`` each -> all rows, one part after the other."""
    return torch.cat(parts)


def heads_joined(*parts: Tensor) -> Tensor:
    """Kernels ``(I, N, d)`` or biases ``(N, d)`` of JAX's attention -> rows of all heads: ``(O, I)`` or ``(O,)``."""
    return torch.cat([part.flatten(1).t() if part.ndim == 3 else part.flatten() for part in parts])


def heads_mixed(kernel_NdO: Tensor) -> Tensor:
    """``(N, d, O)`` -> ``(O, N * d)``: what follows JAX's attention."""
    return kernel_NdO.flatten(0, 1).t().contiguous()


def of_shape(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The same numbers in the same order in another shape."""
    return lambda value: value.reshape(shape)


def rows(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """Rows ``start .. stop``."""
    return lambda value: value[start:stop].clone()


def zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """What stands for a bias that the file does not have."""
    return lambda: torch.zeros(shape)


def as_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of ``heads_joined`` of one part of that shape."""
    return (prod(shape[1:]), shape[0]) if len(shape) == 3 else (prod(shape),)
