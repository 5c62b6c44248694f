"""Sprites as dSprites has them, and VTAB's two tasks on them: where a sprite is, and how it is turned.

dSprites' six factors: colour (white), shape (square, ellipse, heart), six scales from 0.5 to 1, 40 orientations from 0
to 2 pi, 32 positions along each axis. VTAB joins neighbours among a factor's values to 16 classes.
The outlines of dSprites' ellipse and heart are not published; these are others.

Shape suffixes: H rows, W columns.
"""

from typing import Final

import numpy as np

from spt_dist.data.mini.canvas import IMAGE_SIZE, Draw, Floats, Pixels, fine_grid, pooled, to_pixels

SHAPES: Final = ("square", "ellipse", "heart")
NUM_SCALES: Final = 6
NUM_TURNS: Final = 40
NUM_PLACES: Final = 32
NUM_CLASSES: Final = 16

LOCATION_RADIUS, ORIENTATION_RADIUS = 8.0, 13.0
"""Of the circle around the largest sprite, in pixels. How a smaller one is turned can't be seen in so few pixels."""
_HEART_CENTROID, _HEART_REACH = 0.2935, 1.2935


def place_of(position: int, radius: float) -> float:
    """The centre of a sprite at position 0 to 31, in pixels from the picture's left or upper border.

    Args:
        position: its number.
        radius: of the largest sprite, which is whole at every position.
    """
    margin = radius + 1
    return margin + (IMAGE_SIZE - 2 * margin) * position / (NUM_PLACES - 1)


def turn_of(orientation: int) -> float:
    """The angle of orientation 0 to 39, counter-clockwise; the last is a full turn, as in dSprites."""
    return 2 * np.pi * orientation / (NUM_TURNS - 1)


def scale_of(scale: int) -> float:
    """Size number 0 to 5, relative to the largest."""
    return 0.5 + 0.5 * scale / (NUM_SCALES - 1)


def inside(shape: str, up_HW: Floats, right_HW: Floats) -> Floats:
    """1 inside a sprite that stands upright in the unit circle, 0 outside.

    Args:
        shape: one of ``SHAPES``.
        up_HW, right_HW: coordinates of points.
    """
    if shape == "square":
        return (np.maximum(np.abs(up_HW), np.abs(right_HW)) < np.sqrt(0.5)).astype(float)
    if shape == "ellipse":
        return (up_HW**2 + (right_HW / 0.55) ** 2 < 1).astype(float)
    # The curve (x^2 + y^2 - 1)^3 = x^2 y^3, with its centroid in the middle and its tip on the circle.
    x_HW, y_HW = _HEART_REACH * right_HW, _HEART_REACH * up_HW + _HEART_CENTROID
    return ((x_HW**2 + y_HW**2 - 1) ** 3 < x_HW**2 * y_HW**3).astype(float)


def draw_sprite(shape: str, scale: int, orientation: int, position_x: int, position_y: int, radius: float) -> Floats:
    """A sprite's share of each pixel.

    Args:
        shape: one of ``SHAPES``.
        scale, orientation, position_x, position_y: the numbers of its factors' values.
        radius: of the circle around the largest sprite, in pixels.

    Returns:
        ``(32, 32)``, 0 to 1.
    """
    rows_HW, columns_HW = fine_grid()
    reach = radius * scale_of(scale)
    up_HW = (place_of(position_y, radius) - rows_HW) / reach
    right_HW = (columns_HW - place_of(position_x, radius)) / reach
    cos, sin = np.cos(turn_of(orientation)), np.sin(turn_of(orientation))
    return pooled(inside(shape, cos * up_HW - sin * right_HW, cos * right_HW + sin * up_HW))


def _drawn(rng: np.random.Generator, radius: float) -> tuple[Pixels, int, int]:
    """A picture of a sprite whose factors are independent; its orientation and its position from the left."""
    shape, scale, orientation = rng.choice(SHAPES), int(rng.integers(NUM_SCALES)), int(rng.integers(NUM_TURNS))
    position_x, position_y = rng.integers(NUM_PLACES, size=2).tolist()
    share_HW = draw_sprite(shape, scale, orientation, position_x, position_y, radius)
    return to_pixels(rng, np.repeat(share_HW[..., None], 3, axis=-1), 0.0), orientation, position_x


def location_task() -> Draw:
    """dSprites-loc: the class is the sprite's place from left to right, two positions each."""

    def draw(rng: np.random.Generator, split: str, number: int) -> tuple[Pixels, int]:
        image_HWC, _, position_x = _drawn(rng, LOCATION_RADIUS)
        return image_HWC, position_x * NUM_CLASSES // NUM_PLACES

    return draw


def orientation_task() -> Draw:
    """dSprites-ori: the class is the sprite's angle, two or three orientations each."""

    def draw(rng: np.random.Generator, split: str, number: int) -> tuple[Pixels, int]:
        image_HWC, orientation, _ = _drawn(rng, ORIENTATION_RADIUS)
        return image_HWC, orientation * NUM_CLASSES // NUM_TURNS

    return draw
