"""Textures, photographed and drawn from formulas, and how coarse a grain is: tasks like VTAB's specialized ones.

None of the demo backbone's textures is among them.

Shape suffixes: H rows, W columns, K points.
"""

from collections.abc import Callable
from typing import Final

import numpy as np

from spt_dist.data.mini.canvas import IMAGE_SIZE, Draw, Floats, Pixels, coloured, lit, to_pixels, two_colours
from spt_dist.data.mini.photos import draw_patch, load_photo

Painter = Callable[[np.random.Generator, Floats, Floats], Floats]

NUM_GRADES: Final = 5
WAVELENGTHS: Final = np.geomspace(3.0, 16.0, NUM_GRADES + 1)
"""Lengths in pixels between which the grades' grains lie, finest first."""
_BANDWIDTH: Final = 0.36


def filtered_noise(rng: np.random.Generator, gain: Callable[[Floats, Floats], Floats]) -> Floats:
    """Noise with a given spectrum, ``(32, 32)``, of mean 0 and deviation 1.

    Args:
        rng: draws it.
        gain: from frequencies down and right, in cycles a pixel, to the size of their waves.
    """
    # Twice as large as the picture, whose borders would fit together otherwise.
    size = 2 * IMAGE_SIZE
    frequencies = np.fft.fftfreq(size).astype(np.float64)
    down, right = frequencies[:, None], frequencies[None]
    spectrum = np.fft.fft2(rng.standard_normal((size, size))) * gain(down, right)
    noise_HW: Floats = np.fft.ifft2(spectrum).real[:IMAGE_SIZE, :IMAGE_SIZE]
    return (noise_HW - noise_HW.mean()) / noise_HW.std()


def _spread_points(rng: np.random.Generator, spacing: float, y_HW: Floats, x_HW: Floats) -> Floats:
    """Points on and around the picture, one in each cell of a shaken grid: ``(K, 2)``, pixels."""
    steps = [np.arange(axis_HW.min() - 2 * spacing, axis_HW.max() + 2 * spacing, spacing) for axis_HW in (y_HW, x_HW)]
    grid_K2 = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 2)
    return grid_K2 + rng.uniform(0, spacing, grid_K2.shape)


def _two_nearest(points_K2: Floats, y_HW: Floats, x_HW: Floats) -> tuple[Floats, Floats]:
    """Distances from each pixel to the closest point and to the second one."""
    gaps_KHW = np.hypot(points_K2[:, 0, None, None] - y_HW, points_K2[:, 1, None, None] - x_HW)
    nearest_KHW = np.partition(gaps_KHW, 1, axis=0)
    return nearest_KHW[0], nearest_KHW[1]


def _cells(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Round spots that touch."""
    spacing = rng.uniform(4, 9)
    first_HW, _ = _two_nearest(_spread_points(rng, spacing, y_HW, x_HW), y_HW, x_HW)
    return 1 - first_HW / spacing


def _cracks(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Thin lines around cells."""
    points_K2 = _spread_points(rng, rng.uniform(5, 11), y_HW, x_HW)
    first_HW, second_HW = _two_nearest(points_K2, y_HW, x_HW)
    return 1 - (second_HW - first_HW) / rng.uniform(1.2, 2.4)


def _bubbles(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Rings of many sizes that cross each other."""
    rings_HW = np.zeros_like(y_HW)
    for _ in range(rng.integers(20, 36)):
        centre_y, centre_x = (rng.uniform(axis_HW.min(), axis_HW.max()) for axis_HW in (y_HW, x_HW))
        gap_HW = np.abs(np.hypot(y_HW - centre_y, x_HW - centre_x) - rng.uniform(2, 6))
        rings_HW = np.maximum(rings_HW, 1.3 - gap_HW)
    return rings_HW


def _weave(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Threads that go over and under each other."""
    pitch = rng.uniform(4, 8)
    is_over_HW = (np.floor(y_HW / pitch) + np.floor(x_HW / pitch)) % 2 == 0
    level_HW, upright_HW = (np.abs(np.sin(np.pi * axis_HW / pitch)) for axis_HW in (y_HW, x_HW))
    return np.where(is_over_HW, level_HW, 0.75 * upright_HW)


def _scales(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Rows of half discs, each row shifted by half of one."""
    radius = rng.uniform(3.5, 6.5)
    shade_HW = np.zeros_like(y_HW)
    lowest = np.full_like(y_HW, -np.inf)
    for row in range(-12, 24):
        top = row * radius
        middle_HW = (x_HW - radius * (row % 2)) % (2 * radius) - radius
        gap_HW = np.hypot(y_HW - top, middle_HW) / radius
        is_inside_HW = (gap_HW < 1) & (y_HW >= top - radius) & (lowest == -np.inf)
        shade_HW = np.where(is_inside_HW, gap_HW, shade_HW)
        lowest = np.where(is_inside_HW, top, lowest)
    return shade_HW


def _herringbone(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Slanted stripes that turn back from column to column."""
    width, length = rng.uniform(5, 10), rng.uniform(3.5, 7)
    fold_HW = np.abs((x_HW / width) % 2 - 1) * width
    return 0.5 + 0.5 * np.sin(2 * np.pi * (y_HW + fold_HW) / length)


def _marble(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Veins: stripes bent by slow noise."""
    bend_HW = filtered_noise(rng, lambda down, right: np.exp(-((np.hypot(down, right) * 14) ** 2)))
    return np.abs(np.sin(np.pi * x_HW / rng.uniform(7, 12) + rng.uniform(1.2, 2) * bend_HW))


def _fibres(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Noise that is long in one direction."""
    angle, length, width = rng.uniform(0, np.pi), rng.uniform(15, 25), rng.uniform(1.5, 3)
    cos, sin = np.cos(angle), np.sin(angle)
    return filtered_noise(
        rng,
        lambda down, right: np.exp(
            -((length * (cos * down + sin * right)) ** 2) - (width * (cos * right - sin * down)) ** 2
        ),
    )


def _clumps(rng: np.random.Generator, y_HW: Floats, x_HW: Floats) -> Floats:
    """Noise that looks alike at every size."""
    power = rng.uniform(1.2, 1.8)
    return filtered_noise(rng, lambda down, right: np.maximum(np.hypot(down, right), 1 / 64) ** -power)


_PAINTERS: Final[dict[str, Painter]] = {
    "cells": _cells,
    "cracks": _cracks,
    "bubbles": _bubbles,
    "weave": _weave,
    "scales": _scales,
    "herringbone": _herringbone,
    "marble": _marble,
    "fibres": _fibres,
    "clumps": _clumps,
}
_PHOTOGRAPHS: Final = ("brick", "grass", "gravel")
TEXTURES: Final = (*_PAINTERS, *_PHOTOGRAPHS)


def _turned_grid(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Pixel centres, rows and columns, turned and shifted at random."""
    y_HW, x_HW = np.indices((IMAGE_SIZE, IMAGE_SIZE)) - (IMAGE_SIZE - 1) / 2
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    down, right = rng.uniform(0, 20, 2) + IMAGE_SIZE / 2
    return cos * y_HW - sin * x_HW + down, sin * y_HW + cos * x_HW + right


def _levelled(share_HW: Floats) -> Floats:
    """The same texture with mean 0.5 and the same contrast as the others, so that neither tells it."""
    return (0.5 + 0.28 * (share_HW - share_HW.mean()) / share_HW.std()).clip(0, 1)


def _textured(rng: np.random.Generator, share_HW: Floats, noise: float) -> Pixels:
    if rng.random() < 0.5:
        share_HW = 1 - share_HW
    image_HWC = coloured(share_HW, *two_colours(rng, (0.25, 0.75)))
    return to_pixels(rng, lit(rng, image_HWC, 0.3), noise)


def textures_task() -> Draw:
    """Which of twelve textures it is; three are photographs."""
    photographs = {name: load_photo(name)[..., 0] for name in _PHOTOGRAPHS}

    def draw(rng: np.random.Generator, split: str, number: int) -> tuple[Pixels, int]:
        label = int(rng.integers(len(TEXTURES)))
        name = TEXTURES[label]
        if name in photographs:
            share_HW = draw_patch(rng, photographs[name], split, 40) / 255
            share_HW = np.rot90(share_HW, int(rng.integers(4)))
        else:
            share_HW = _PAINTERS[name](rng, *_turned_grid(rng)).clip(-3, 3)
        return _textured(rng, _levelled(share_HW), 0.12), label

    return draw


def draw_grain(rng: np.random.Generator, wavelength: float) -> Floats:
    """Noise whose waves are about ``wavelength`` pixels long, ``(32, 32)``, of mean 0 and deviation 1."""

    def gain(down: Floats, right: Floats) -> Floats:
        octaves: Floats = np.log2(np.hypot(down, right).clip(1e-3) * wavelength)
        return np.exp(-0.5 * (octaves / _BANDWIDTH) ** 2)

    return filtered_noise(rng, gain)


def grades_task() -> Draw:
    """How coarse a grain is, in five grades: classes in an order, as those of diabetic retinopathy."""

    def draw(rng: np.random.Generator, split: str, number: int) -> tuple[Pixels, int]:
        label = int(rng.integers(NUM_GRADES))
        low, high = np.log(WAVELENGTHS[label : label + 2])
        grain_HW = draw_grain(rng, np.exp(rng.uniform(low, high)))
        # From soft hills to sharp islands.
        share_HW = np.tanh(rng.uniform(0.5, 3) * (grain_HW + rng.uniform(-0.7, 0.7)))
        return _textured(rng, _levelled(share_HW), 0.12), label

    return draw
