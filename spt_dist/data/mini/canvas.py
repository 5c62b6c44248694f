"""What the tasks' pictures have in common: their size, their colours, and how they become bytes.

Shape suffixes: H rows, W columns, C colour channels.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

Draw = Callable[[np.random.Generator, str, int], tuple[Pixels, int]]
"""Draws a picture: from a generator, "train", "val" or "test" and a number in it to RGB ``(32, 32, 3)`` and a label."""

IMAGE_SIZE: Final = 32
FINE: Final = 4
"""Points a pixel, along each axis, where outlines are sharp."""


def fine_grid() -> tuple[Floats, Floats]:
    """Where a picture's points are, in pixels from its top left corner: rows and columns, each ``(128, 128)``."""
    steps = (np.arange(IMAGE_SIZE * FINE) + 0.5) / FINE
    rows_HW, columns_HW = np.meshgrid(steps, steps, indexing="ij")
    return rows_HW, columns_HW


def pooled(fine: npt.NDArray[Any]) -> Floats:
    """Means over each pixel's points: ``(128, 128, ...)`` to ``(32, 32, ...)``."""
    split = fine.reshape(IMAGE_SIZE, FINE, IMAGE_SIZE, FINE, *fine.shape[2:])
    means: Floats = split.mean(axis=(1, 3))
    return means


def two_colours(rng: np.random.Generator, contrast: tuple[float, float]) -> tuple[Floats, Floats]:
    """Two colours, each ``(3,)``, 0 to 1, that differ in brightness; either may be the brighter one.

    Args:
        rng: draws them.
        contrast: the least and the largest difference in brightness.
    """
    half = rng.uniform(*contrast) / 2
    middle = rng.uniform(half, 1 - half)
    # Hues without a mean, or they would undo the difference in brightness.
    hues_2C = rng.uniform(-0.3, 0.3, (2, 3))
    hues_2C -= hues_2C.mean(axis=1, keepdims=True)
    sign = rng.choice((-1, 1))
    first_C, second_C = np.clip(middle + np.array([[sign * half], [-sign * half]]) + hues_2C, 0, 1)
    return first_C, second_C


def coloured(share_HW: Floats, first_C: Floats, second_C: Floats) -> Floats:
    """A picture ``(H, W, 3)`` that is ``first_C`` where the share is 1 and ``second_C`` where it is 0."""
    return second_C + share_HW[..., None] * (first_C - second_C)


def lit(rng: np.random.Generator, image_HWC: Floats, strength: float) -> Floats:
    """The picture with a slow change of brightness across it, of up to ``strength`` at its borders."""
    ramp = np.linspace(-1, 1, IMAGE_SIZE)
    down, right = rng.uniform(-strength / 2, strength / 2, 2)
    return image_HWC + (down * ramp[:, None] + right * ramp[None])[..., None]


def to_pixels(rng: np.random.Generator, image_HWC: Floats, noise: float) -> Pixels:
    """Bytes of a picture with values 0 to 1, with normal noise of a random strength up to ``noise``."""
    noisy_HWC = image_HWC + rng.uniform(0, noise) * rng.standard_normal(image_HWC.shape)
    return np.round(255 * noisy_HWC.clip(0, 1)).astype(np.uint8)
