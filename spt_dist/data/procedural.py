"""Colourful 32x32 images of strokes, shapes and textures, drawn from formulas.

The demo backbone is pre-trained on these images, so that the demo needs no download. The classes are
abstract (lines, junctions, arcs, rings, polygons, textures): there is no font and no set of glyphs.

Shape suffixes: N images, K corner points of a path, S straight segments, P pixels in row order,
H rows, W columns, C colour channels. Geometry lives in the square [-1, 1] x [-1, 1], y pointing up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
StrokeBuilder = Callable[[np.random.Generator, int], Floats]
TexturePainter = Callable[[np.random.Generator, Floats, Floats], Floats]
Path = tuple[tuple[float, float], ...]

IMAGE_SIZE: Final = 32

# Larger chunks do not draw faster, and one distance map for 256 images is already a megabyte.
_CHUNK: Final = 256
# Orientation is part of what these classes mean, so they may only lean; the others turn freely.
_LEAN: Final = 0.3
_FREE: Final = float(np.pi)
_CURVE_POINTS: Final = 18


@dataclass(frozen=True)
class _Figure:
    """A class drawn from straight segments, as strokes or as the area that they enclose."""

    build: StrokeBuilder
    max_turn: float = _FREE
    filled: bool = False


@dataclass(frozen=True)
class _Texture:
    """A class that covers the whole image."""

    paint: TexturePainter


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Floats:
    return rng.uniform(low, high, shape).astype(np.float32)


def _unit(values: npt.NDArray[Any]) -> Floats:
    clipped: Floats = np.clip(values, 0.0, 1.0).astype(np.float32)
    return clipped


def _chain(x_NK: npt.NDArray[Any], y_NK: npt.NDArray[Any]) -> Floats:
    """Joins consecutive points: two (N, K) arrays to segments (N, K-1, 4) of (x0, y0, x1, y1)."""
    columns = [x_NK[:, :-1], y_NK[:, :-1], x_NK[:, 1:], y_NK[:, 1:]]
    return np.stack(columns, axis=-1).astype(np.float32)


def _paths(*paths: Path) -> StrokeBuilder:
    def build(rng: np.random.Generator, num_images: int) -> Floats:
        del rng
        rows = [(*a, *b) for path in paths for a, b in pairwise(path)]
        segments_S4 = np.asarray(rows, dtype=np.float32)
        return np.broadcast_to(segments_S4, (num_images, *segments_S4.shape)).copy()

    return build


def _arc(direction: float) -> StrokeBuilder:
    """An arc whose opening points in `direction` (radians, 0 is to the right)."""

    def build(rng: np.random.Generator, num_images: int) -> Floats:
        half_gap_N1 = _uniform(rng, 0.6, 1.6, num_images, 1)
        steps_1K = np.linspace(0.0, 1.0, _CURVE_POINTS, dtype=np.float32)[None]
        angle_NK = direction + half_gap_N1 + steps_1K * (2 * np.pi - 2 * half_gap_N1)
        return _chain(np.cos(angle_NK), np.sin(angle_NK))

    return build


def _snake(low: float, high: float, flip: float) -> StrokeBuilder:
    """A sine curve with between `low` and `high` periods; `flip` -1 mirrors it."""

    def build(rng: np.random.Generator, num_images: int) -> Floats:
        periods_N1 = _uniform(rng, low, high, num_images, 1)
        height_N1 = flip * _uniform(rng, 0.35, 0.65, num_images, 1)
        x_1K = np.linspace(-1.0, 1.0, _CURVE_POINTS + 4, dtype=np.float32)[None]
        y_NK = height_N1 * np.sin(np.pi * periods_N1 * x_1K)
        return _chain(np.broadcast_to(x_1K, y_NK.shape), y_NK)

    return build


def _spiral(flip: float) -> StrokeBuilder:
    def build(rng: np.random.Generator, num_images: int) -> Floats:
        turns_N1 = _uniform(rng, 1.3, 2.1, num_images, 1)
        steps_1K = np.linspace(0.0, 1.0, 2 * _CURVE_POINTS, dtype=np.float32)[None]
        angle_NK = flip * 2 * np.pi * turns_N1 * steps_1K
        return _chain((0.1 + 0.9 * steps_1K) * np.cos(angle_NK), (0.1 + 0.9 * steps_1K) * np.sin(angle_NK))

    return build


def _hook(flip: float) -> StrokeBuilder:
    """A straight stem that ends in a half circle; `flip` -1 mirrors it."""

    def build(rng: np.random.Generator, num_images: int) -> Floats:
        radius_N1 = _uniform(rng, 0.3, 0.5, num_images, 1)
        angle_1K = np.linspace(0.0, -np.pi, 10, dtype=np.float32)[None]
        x_NK = radius_N1 * np.cos(angle_1K)
        y_NK = radius_N1 * np.sin(angle_1K) - 0.4
        top_N1 = np.full_like(radius_N1, 1.0)
        return _chain(flip * np.hstack([radius_N1, x_NK]), np.hstack([top_N1, y_NK]))

    return build


def _loop(rng: np.random.Generator, num_images: int) -> Floats:
    """A curve that crosses itself once, as in a tied ribbon."""
    crossing_N1 = _uniform(rng, 0.45, 0.65, num_images, 1)
    steps_1K = np.linspace(-1.0, 1.0, _CURVE_POINTS + 4, dtype=np.float32)[None]
    x_NK = 2.0 * (steps_1K**3 - crossing_N1 * steps_1K)
    return _chain(x_NK, np.broadcast_to(1.7 * steps_1K**2 - 0.85, x_NK.shape))


def _polygon(sides: int, radius: float = 1.0, shift: float = 0.0) -> StrokeBuilder:
    def build(rng: np.random.Generator, num_images: int) -> Floats:
        del rng
        angle_1K = np.linspace(0.0, 2 * np.pi, sides + 1, dtype=np.float32)[None].repeat(num_images, axis=0)
        return _chain(radius * np.cos(angle_1K) + shift, radius * np.sin(angle_1K))

    return build


def _star(rng: np.random.Generator, num_images: int) -> Floats:
    inner_N1 = _uniform(rng, 0.35, 0.5, num_images, 1)
    angle_1K = np.linspace(0.0, 2 * np.pi, 11, dtype=np.float32)[None]
    radius_NK = np.where(np.arange(11)[None] % 2 == 0, np.float32(1.0), inner_N1)
    return _chain(radius_NK * np.cos(angle_1K), radius_NK * np.sin(angle_1K))


def _crescent(rng: np.random.Generator, num_images: int) -> Floats:
    bite_N1 = _uniform(rng, 0.2, 0.6, num_images, 1)
    outer_1K = np.linspace(0.5 * np.pi, 1.5 * np.pi, 12, dtype=np.float32)[None]
    x_NK = np.hstack([np.cos(outer_1K) + 0 * bite_N1, bite_N1 * np.cos(outer_1K[:, ::-1])]) + 0.4
    y_1K = np.hstack([np.sin(outer_1K), np.sin(outer_1K[:, ::-1])])
    return _chain(x_NK, np.broadcast_to(y_1K, x_NK.shape))


def _both(first: StrokeBuilder, second: StrokeBuilder) -> StrokeBuilder:
    def build(rng: np.random.Generator, num_images: int) -> Floats:
        return np.concatenate([first(rng, num_images), second(rng, num_images)], axis=1)

    return build


def _grating(rng: np.random.Generator, x_NP: Floats, y_NP: Floats) -> Floats:
    del y_NP
    pitch_N1 = _uniform(rng, 5.0, 13.0, len(x_NP), 1)
    return _unit(0.5 + 0.5 * np.sin(pitch_N1 * x_NP))


def _checkerboard(rng: np.random.Generator, x_NP: Floats, y_NP: Floats) -> Floats:
    pitch_N1 = _uniform(rng, 4.0, 8.0, len(x_NP), 1)
    return _unit(0.5 + 2.5 * np.sin(pitch_N1 * x_NP) * np.sin(pitch_N1 * y_NP))


def _dot_grid(rng: np.random.Generator, x_NP: Floats, y_NP: Floats) -> Floats:
    pitch_N1 = _uniform(rng, 6.0, 10.0, len(x_NP), 1)
    return _unit(1.5 * (np.cos(pitch_N1 * x_NP) + np.cos(pitch_N1 * y_NP)) - 0.7)


def _target(rng: np.random.Generator, x_NP: Floats, y_NP: Floats) -> Floats:
    pitch_N1 = _uniform(rng, 7.0, 13.0, len(x_NP), 1)
    return _unit(0.5 + 0.5 * np.sin(pitch_N1 * np.hypot(x_NP, y_NP)))


def _rays(rng: np.random.Generator, x_NP: Floats, y_NP: Floats) -> Floats:
    count_N1 = rng.integers(4, 8, (len(x_NP), 1)).astype(np.float32)
    return _unit(0.5 + np.sin(count_N1 * np.arctan2(y_NP, x_NP)))


def _clouds(rng: np.random.Generator, x_NP: Floats, y_NP: Floats) -> Floats:
    """Blobs of no particular shape: a sum of plane waves in random directions."""
    total_NP = np.zeros_like(x_NP)
    for _ in range(6):
        fx_N1, fy_N1 = _uniform(rng, -6.0, 6.0, 2, len(x_NP), 1)
        total_NP += np.sin(fx_N1 * x_NP + fy_N1 * y_NP + _uniform(rng, 0.0, 6.3, len(x_NP), 1))
    return _unit(0.5 + 0.6 * total_NP)


_RING: Final = _polygon(_CURVE_POINTS)

_RECIPES: Final[dict[str, _Figure | _Texture]] = {
    "line_level": _Figure(_paths(((-1, 0), (1, 0))), _LEAN),
    "line_rising": _Figure(_paths(((-0.7, -0.7), (0.7, 0.7))), _LEAN),
    "line_upright": _Figure(_paths(((0, -1), (0, 1))), _LEAN),
    "line_falling": _Figure(_paths(((-0.7, 0.7), (0.7, -0.7))), _LEAN),
    "line_pair": _Figure(_paths(((-1, -0.4), (1, -0.4)), ((-1, 0.4), (1, 0.4)))),
    "right_corner": _Figure(_paths(((-0.7, 0.8), (-0.7, -0.7), (0.8, -0.7)))),
    "sharp_corner": _Figure(_paths(((-0.4, 0.9), (0.0, -0.9), (0.4, 0.9)))),
    "tee": _Figure(_paths(((-0.9, 0.5), (0.9, 0.5)), ((0, 0.5), (0, -1)))),
    "cross": _Figure(_paths(((-1, 0), (1, 0)), ((0, -1), (0, 1)))),
    "three_way": _Figure(_paths(((0, 0), (0, -1)), ((-0.85, 0.6), (0, 0), (0.85, 0.6)))),
    "bracket": _Figure(_paths(((0.7, 0.7), (-0.6, 0.7), (-0.6, -0.7), (0.7, -0.7)))),
    "zigzag": _Figure(_paths(((-1, -0.5), (-0.5, 0.5), (0, -0.5), (0.5, 0.5), (1, -0.5)))),
    "arc_open_right": _Figure(_arc(0.0), _LEAN),
    "arc_open_up": _Figure(_arc(0.5 * np.pi), _LEAN),
    "arc_open_left": _Figure(_arc(np.pi), _LEAN),
    "arc_open_down": _Figure(_arc(1.5 * np.pi), _LEAN),
    "snake_left": _Figure(_snake(0.9, 1.1, -1.0)),
    "snake_right": _Figure(_snake(0.9, 1.1, 1.0)),
    "wave": _Figure(_snake(1.8, 2.3, 1.0)),
    "spiral_left": _Figure(_spiral(1.0)),
    "spiral_right": _Figure(_spiral(-1.0)),
    "hook_left": _Figure(_hook(1.0)),
    "hook_right": _Figure(_hook(-1.0)),
    "loop": _Figure(_loop),
    "ring": _Figure(_RING),
    "ring_pair": _Figure(_both(_polygon(12, 0.35, -0.65), _polygon(12, 0.35, 0.65))),
    "ring_beside_line": _Figure(_both(_polygon(12, 0.5, -0.45), _paths(((0.6, -1), (0.6, 1))))),
    "triangle": _Figure(_polygon(3)),
    "square": _Figure(_polygon(4)),
    "star": _Figure(_star),
    "solid_disc": _Figure(_RING, filled=True),
    "solid_triangle": _Figure(_polygon(3), filled=True),
    "solid_square": _Figure(_polygon(4), filled=True),
    "solid_crescent": _Figure(_crescent, filled=True),
    "grating": _Texture(_grating),
    "checkerboard": _Texture(_checkerboard),
    "dot_grid": _Texture(_dot_grid),
    "target": _Texture(_target),
    "rays": _Texture(_rays),
    "clouds": _Texture(_clouds),
}

CLASSES: Final[tuple[str, ...]] = tuple(_RECIPES)
"""Class names; the label of an image is the position of its class here."""


def _pixel_grid(rng: np.random.Generator, num_images: int) -> tuple[Floats, Floats]:
    """Pixel centres, two (N, P) arrays, gently bent so that no stroke is perfectly straight."""
    centres_W = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / (0.5 * IMAGE_SIZE) - 1.0
    y_HW, x_HW = np.meshgrid(-centres_W, centres_W, indexing="ij")
    x_1P, y_1P = x_HW.reshape(1, -1), y_HW.reshape(1, -1)
    bend_2N1 = _uniform(rng, 0.0, 0.07, 2, num_images, 1)
    pitch_2N1 = _uniform(rng, 1.5, 5.0, 2, num_images, 1)
    phase_2N1 = _uniform(rng, 0.0, 6.3, 2, num_images, 1)
    x_NP = x_1P + bend_2N1[0] * np.sin(pitch_2N1[0] * y_1P + phase_2N1[0])
    y_NP = y_1P + bend_2N1[1] * np.sin(pitch_2N1[1] * x_1P + phase_2N1[1])
    return x_NP, y_NP


def _posed(rng: np.random.Generator, segments_NS4: Floats, max_turn: float) -> Floats:
    """Stretches, turns and moves every image's segments at random; returns (N, S, 4)."""
    num_images = len(segments_NS4)
    turn_N11 = _uniform(rng, -max_turn, max_turn, num_images, 1, 1)
    size_N11 = _uniform(rng, 0.48, 0.85, num_images, 1, 1)
    # At least one pixel row stays between most figures and the border, wherever they move.
    room_N11 = np.maximum(0.92 - size_N11, 0.0)
    x_NS2 = segments_NS4[..., 0::2] * size_N11 * _uniform(rng, 0.75, 1.0, num_images, 1, 1)
    y_NS2 = segments_NS4[..., 1::2] * size_N11 * _uniform(rng, 0.8, 1.0, num_images, 1, 1)
    shift_2N11 = room_N11 * _uniform(rng, -1.0, 1.0, 2, num_images, 1, 1)
    cos_N11, sin_N11 = np.cos(turn_N11), np.sin(turn_N11)
    posed_NS4 = np.empty_like(segments_NS4)
    posed_NS4[..., 0::2] = cos_N11 * x_NS2 - sin_N11 * y_NS2 + shift_2N11[0]
    posed_NS4[..., 1::2] = sin_N11 * x_NS2 + cos_N11 * y_NS2 + shift_2N11[1]
    return posed_NS4


def _distance(segments_NS4: Floats, x_NP: Floats, y_NP: Floats, filled: bool) -> Floats:
    """Distance from each pixel to the nearest segment, (N, P); 0 inside a filled outline."""
    nearest_NP = np.full_like(x_NP, 1e6)
    inside_NP = np.zeros(x_NP.shape, dtype=bool)
    for index in range(segments_NS4.shape[1]):
        x0_N1, y0_N1, x1_N1, y1_N1 = np.split(segments_NS4[:, index], 4, axis=1)
        dx_N1, dy_N1 = x1_N1 - x0_N1, y1_N1 - y0_N1
        from_x_NP, from_y_NP = x_NP - x0_N1, y_NP - y0_N1
        length_N1 = dx_N1**2 + dy_N1**2 + 1e-8
        along_NP = np.clip(from_x_NP * (dx_N1 / length_N1) + from_y_NP * (dy_N1 / length_N1), 0.0, 1.0)
        gap_NP = (from_x_NP - along_NP * dx_N1) ** 2 + (from_y_NP - along_NP * dy_N1) ** 2
        np.minimum(nearest_NP, gap_NP, out=nearest_NP)
        if filled:
            crosses_NP = (y0_N1 > y_NP) != (y1_N1 > y_NP)
            slope_N1 = dx_N1 / np.where(np.abs(dy_N1) < 1e-8, np.float32(1e-8), dy_N1)
            inside_NP ^= crosses_NP & (from_x_NP < slope_N1 * from_y_NP)
    return np.where(inside_NP, np.float32(0.0), np.sqrt(nearest_NP))


def _coverage(rng: np.random.Generator, recipe: _Figure | _Texture, num_images: int) -> Floats:
    """How much of each pixel is foreground: (N, P) in [0, 1]."""
    x_NP, y_NP = _pixel_grid(rng, num_images)
    if isinstance(recipe, _Texture):
        turn_N1 = _uniform(rng, -_FREE, _FREE, num_images, 1)
        shift_2N1 = _uniform(rng, -0.5, 0.5, 2, num_images, 1)
        x_NP, y_NP = x_NP - shift_2N1[0], y_NP - shift_2N1[1]
        cos_N1, sin_N1 = np.cos(turn_N1), np.sin(turn_N1)
        return recipe.paint(rng, cos_N1 * x_NP + sin_N1 * y_NP, cos_N1 * y_NP - sin_N1 * x_NP)
    segments_NS4 = _posed(rng, recipe.build(rng, num_images), recipe.max_turn)
    distance_NP = _distance(segments_NS4, x_NP, y_NP, recipe.filled)
    half_width_N1 = _uniform(rng, 0.05, 0.17, num_images, 1)
    softness_N1 = _uniform(rng, 0.06, 0.2, num_images, 1)
    return _unit(0.5 + (half_width_N1 - distance_NP) / softness_N1)


def _colours(rng: np.random.Generator, num_images: int) -> tuple[Floats, Floats]:
    """Foreground and background colours, each (N, 1, 3) in [0, 1], of different brightness."""
    light_N11 = _uniform(rng, 0.65, 1.0, num_images, 1, 1)
    dark_N11 = _uniform(rng, 0.0, 0.3, num_images, 1, 1)
    # A good share of grey, light-on-dark images: that is what scanned handwriting looks like.
    tint_N11 = np.where(rng.random((num_images, 1, 1)) < 0.4, 0.0, 0.9).astype(np.float32)
    # Hues without a mean: tinting must not undo the difference in brightness.
    hue_2N1C = _uniform(rng, -0.5, 0.5, 2, num_images, 1, 3)
    hue_2N1C -= hue_2N1C.mean(axis=-1, keepdims=True)
    light_N1C = _unit(light_N11 + tint_N11 * hue_2N1C[0])
    dark_N1C = _unit(dark_N11 + tint_N11 * hue_2N1C[1])
    swap_N11 = rng.random((num_images, 1, 1)) < 0.3
    return np.where(swap_N11, dark_N1C, light_N1C), np.where(swap_N11, light_N1C, dark_N1C)


def _coarsener(factor: int) -> Floats:
    """The (32, 32) matrix that averages rows in groups of `factor` and interpolates them back."""
    small = IMAGE_SIZE // factor
    pool = np.repeat(np.eye(small), factor, axis=1) / factor
    centres = np.clip((np.arange(IMAGE_SIZE) + 0.5) / factor - 0.5, 0.0, small - 1.0)
    spread = np.clip(1.0 - np.abs(centres[:, None] - np.arange(small)[None]), 0.0, None)
    return (spread @ pool).astype(np.float32)


_COARSENERS: Final[Floats] = np.stack([_coarsener(1), _coarsener(2), _coarsener(4)])


def _painted(rng: np.random.Generator, recipe: _Figure | _Texture, num_images: int) -> npt.NDArray[np.uint8]:
    """Images of one class: uint8 (N, 32, 32, 3)."""
    cover_NP1 = _coverage(rng, recipe, num_images)[..., None]
    fore_N1C, back_N1C = _colours(rng, num_images)
    ramp_W = np.linspace(-1.0, 1.0, IMAGE_SIZE, dtype=np.float32)
    slope_2N11 = _uniform(rng, -0.12, 0.12, 2, num_images, 1, 1)
    ramp_NHW = slope_2N11[0] * ramp_W[None, :, None] + slope_2N11[1] * ramp_W[None, None, :]
    back_NPC = back_N1C + ramp_NHW.reshape(num_images, -1, 1)
    image_NHWC = (back_NPC + cover_NP1 * (fore_N1C - back_NPC)).reshape(num_images, IMAGE_SIZE, IMAGE_SIZE, 3)
    # Small scans that were enlarged have lost their detail; some images must look like that.
    coarse_NHH = _COARSENERS[rng.choice(3, num_images, p=[0.5, 0.3, 0.2])]
    image_NHWC = np.einsum("nij,njwc->niwc", coarse_NHH, image_NHWC, optimize=True)
    image_NHWC = np.einsum("nij,nhjc->nhic", coarse_NHH, image_NHWC, optimize=True)
    strength_N111 = _uniform(rng, 0.0, 0.07, num_images, 1, 1, 1)
    image_NHWC = image_NHWC + strength_N111 * rng.standard_normal(image_NHWC.shape, dtype=np.float32)
    return np.round(255.0 * _unit(image_NHWC)).astype(np.uint8)


def draw_images(num_images: int, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Draws labelled images; the same arguments always give the same images.

    Args:
        num_images: how many images to draw, at least 1.
        seed: a non-negative integer; another seed gives other images in another order.

    Returns:
        images, uint8 (num_images, 32, 32, 3) with values 0 to 255 (rows, columns, RGB), and labels,
        int64 (num_images,) with values 0 to len(CLASSES) - 1. Class sizes differ by at most one, so
        every class is drawn once there are at least len(CLASSES) images.

    Raises:
        ValueError: if num_images is below 1 or seed is negative.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}: ask for at least 1 image")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give an integer that is 0 or larger")
    rng = np.random.default_rng(seed)
    labels_N = rng.permutation(np.arange(num_images, dtype=np.int64) % len(CLASSES))
    images_NHWC = np.empty((num_images, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for label, recipe in enumerate(_RECIPES.values()):
        places = np.flatnonzero(labels_N == label)
        for start in range(0, len(places), _CHUNK):
            chunk = places[start : start + _CHUNK]
            images_NHWC[chunk] = _painted(rng, recipe, len(chunk))
    return images_NHWC, labels_N
