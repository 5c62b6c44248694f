"""Sprites: the class is what the picture shows.

Shape suffixes: H rows, W columns, C colours.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from spt_dist.data.mini import sprites
from spt_dist.data.mini.canvas import Draw
from spt_dist.data.mini.sprites import draw_sprite, location_task, orientation_task


def centroid(share_HW: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Row and column, in pixels from the upper left corner."""
    rows_HW, columns_HW = np.indices(share_HW.shape) + 0.5
    return float((rows_HW * share_HW).sum() / share_HW.sum()), float((columns_HW * share_HW).sum() / share_HW.sum())


def long_axis(share_HW: npt.NDArray[np.float64]) -> float:
    """Angle of the principal axis to the vertical, counter-clockwise, 0 to pi."""
    row, column = centroid(share_HW)
    rows_HW, columns_HW = np.indices(share_HW.shape) + 0.5
    up, right = (row - rows_HW).ravel(), (columns_HW - column).ravel()
    moments = np.cov(np.stack([up, right]), aweights=share_HW.ravel(), bias=True)
    vector = np.linalg.eigh(moments)[1][:, 1]
    return float(np.arctan2(-vector[1], vector[0]) % np.pi)


@pytest.mark.parametrize("shape", sprites.SHAPES)
def test_position_moves_the_sprite_and_nothing_else(shape: str) -> None:
    for position in range(32):
        row, column = centroid(draw_sprite(shape, 5, 0, position, 31 - position, sprites.LOCATION_RADIUS))
        away = sprites.LOCATION_RADIUS + 1
        assert column == pytest.approx(away + (32 - 2 * away) * position / 31, abs=0.3)
        assert row == pytest.approx(away + (32 - 2 * away) * (31 - position) / 31, abs=0.3)


def test_orientation_turns_the_ellipse() -> None:
    for orientation in range(40):
        found = long_axis(draw_sprite("ellipse", 5, orientation, 16, 16, 13.0))
        wanted = (2 * np.pi * orientation / 39) % np.pi
        assert min(abs(found - wanted), np.pi - abs(found - wanted)) < 0.03


def heart_outline() -> npt.NDArray[np.float64]:
    """Points right and up, (360, 2), of the upright curve, found along rays from its inside by halving."""
    rays = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    low, high = np.zeros(360), np.full(360, 2.0)
    for _ in range(40):
        middle = (low + high) / 2
        x, y = middle * np.cos(rays), middle * np.sin(rays)
        is_inside = (x**2 + y**2 - 1) ** 3 < x**2 * y**3
        low, high = np.where(is_inside, middle, low), np.where(is_inside, high, middle)
    return np.stack([low * np.cos(rays), low * np.sin(rays)], axis=1)


def test_orientation_turns_the_heart_all_the_way() -> None:
    """Against a polygon drawn by Pillow, turned counter-clockwise around its centroid."""
    outline = heart_outline()
    x, y = outline.T
    x_next, y_next = np.roll(outline, -1, axis=0).T
    cross = x * y_next - x_next * y
    outline = outline - [0, ((y + y_next) * cross).sum() / (3 * cross.sum())]
    outline /= np.hypot(*outline.T).max()
    for orientation in range(40):
        angle = 2 * np.pi * orientation / 39
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        right, up = 13 * turn @ outline.T
        place = 14 + 4 * 16 / 31
        canvas = Image.new("L", (512, 512))
        points = np.stack([place + right, place - up], axis=1) * 16
        ImageDraw.Draw(canvas).polygon([(float(column), float(row)) for column, row in points], fill=255)
        wanted_HW = np.asarray(canvas.resize((32, 32), Image.Resampling.BOX)) / 255
        found_HW = draw_sprite("heart", 5, orientation, 16, 16, 13.0)
        assert np.abs(found_HW - wanted_HW).sum() < 0.02 * wanted_HW.sum()


def test_sizes_are_those_of_dsprites() -> None:
    areas = [draw_sprite("square", scale, 3, 10, 20, 8.0).sum() for scale in range(6)]
    assert np.sqrt(np.array(areas) / areas[-1]) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], rel=0.02)


@pytest.mark.parametrize("shape", sprites.SHAPES)
def test_no_sprite_is_cut(shape: str) -> None:
    for orientation in range(0, 40, 3):
        for x, y in ((0, 0), (31, 31), (0, 31)):
            for radius in (sprites.LOCATION_RADIUS, sprites.ORIENTATION_RADIUS):
                share_HW = draw_sprite(shape, 5, orientation, x, y, radius)
                border = np.concatenate([share_HW[0], share_HW[-1], share_HW[:, 0], share_HW[:, -1]])
                assert not border.any()


def many(task: Callable[[], Draw], count: int) -> list[tuple[npt.NDArray[np.float64], int]]:
    """Shares of sprites, 0 to 1, and labels."""
    draw = task()
    drawn = (draw(np.random.default_rng((5, number)), "train", number) for number in range(count))
    return [(image_HWC[..., 0] / 255.0, label) for image_HWC, label in drawn]


def test_location_is_the_sixteenth_that_the_centre_is_in() -> None:
    samples = many(location_task, 300)
    away = sprites.LOCATION_RADIUS + 1
    step = (32 - 2 * away) / 31
    for share_HW, label in samples:
        _, column = centroid(share_HW)
        # Two positions a class.
        lowest, highest = away + 2 * label * step, away + (2 * label + 1) * step
        assert lowest - 0.3 < column < highest + 0.3
    assert {label for _, label in samples} == set(range(16))


def test_orientation_is_the_sixteenth_of_forty_values() -> None:
    """VTAB: floor(number / 2.5). Told by the ellipses, up to half a turn."""
    seen = 0
    for share_HW, label in many(orientation_task, 400):
        rows_HW, columns_HW = np.indices(share_HW.shape) + 0.5
        moments = np.cov(np.stack([rows_HW.ravel(), columns_HW.ravel()]), aweights=share_HW.ravel(), bias=True)
        small, large = np.linalg.eigvalsh(moments)
        if large < 2.2 * small or share_HW.sum() < 40:
            continue
        seen += 1
        numbers = [number for number in range(40) if int(number / 2.5) == label]
        turns = [(2 * np.pi * number / 39) % np.pi for number in numbers]
        found = long_axis(share_HW)
        assert min(min(abs(found - turn), np.pi - abs(found - turn)) for turn in turns) < 0.06
    assert seen > 50
