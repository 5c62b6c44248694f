"""A loss scale for float16, whose range ends at 65504 above and at 6e-8 below."""

from collections.abc import Callable

_LARGEST, _SMALLEST = 2.0**24, 2.0**-24
# Later samples may have gradients this many times those of the first before one overflows.
_HEADROOM = 2.0**10


def find_loss_scale(is_finite: Callable[[float], bool]) -> float:
    """A power of two that lifts the gradients of one sample off the lower end of the range, far below the upper one.

    Args:
        is_finite: whether all gradients of the sample are finite with a loss scale.
    """
    scale = _LARGEST
    while scale > _SMALLEST and not is_finite(scale):
        scale /= 4
    return scale / _HEADROOM
