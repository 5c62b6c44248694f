"""Solids on the ground: count and distance can be read off the picture.

Shape suffixes: H rows, W columns, C colours.
"""

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from spt_dist.data.mini.solids import (
    KINDS,
    NEAREST_BINS,
    Solid,
    count_task,
    distance_task,
    paint_solids,
    place_solids,
    row_of,
)


def patches(image_HWC: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.intp]]:
    """The connected patches of colour: rows of each one's pixels. Ground and shadows are grey."""
    brightest_HW = image_HWC.max(axis=-1) / 255
    colour_HW = 1 - image_HWC.min(axis=-1) / 255 / brightest_HW.clip(0.1)
    labels_HW, count = ndimage.label(colour_HW > 0.33)
    found = [np.nonzero(labels_HW == number)[0] for number in range(1, count + 1)]
    return [rows for rows in found if len(rows) >= 3]


def test_count_is_the_number_of_patches() -> None:
    draw = count_task()
    right = labels_seen = 0
    seen = set()
    for number in range(200):
        image_HWC, label = draw(np.random.default_rng((3, number)), "train", number)
        counted = len(patches(image_HWC))
        assert abs(counted - (label + 3)) <= 1
        right += counted == label + 3
        labels_seen += 1
        seen.add(label)
    assert right > 0.9 * labels_seen
    assert seen == set(range(8))


def test_distance_is_told_by_the_lowest_foot() -> None:
    draw = distance_task()
    seen = set()
    for number in range(200):
        image_HWC, label = draw(np.random.default_rng((4, number)), "train", number)
        lowest = max(rows.max() for rows in patches(image_HWC)) + 1
        near, far = (row_of(depth) for depth in NEAREST_BINS[label : label + 2])
        assert far - 1.2 < lowest < near + 1.2
        seen.add(label)
    assert seen == set(range(6))


def test_classes_of_distance_are_even_steps_of_depth() -> None:
    assert np.diff(NEAREST_BINS) == pytest.approx(0.125)
    assert (NEAREST_BINS[0], len(NEAREST_BINS)) == (1, 7)


def test_ground_is_seen_in_perspective() -> None:
    """From twice as far the ground is half as far below the horizon, and a solid half as large."""
    horizon = 2 * row_of(2.0) - row_of(1.0)
    assert row_of(1.5) - horizon == pytest.approx((row_of(1.0) - horizon) / 1.5)
    near, far = (Solid("sphere", "red", 4.0, depth, 16, False) for depth in (1.0, 2.0))
    assert near.radius == 2 * far.radius


@pytest.mark.parametrize("count", [3, 10])
def test_no_solid_hides_another_and_all_are_whole(count: int) -> None:
    for seed in range(20):
        solids = place_solids(np.random.default_rng(seed), count, None)
        assert len(solids) == count
        boxes = [(s.column - s.radius, s.column + s.radius, s.row - 2 * s.radius, s.row) for s in solids]
        for number, (left, right, top, foot) in enumerate(boxes):
            assert 0 < left < right < 32
            assert 0 < top < foot < 32
            for other_left, other_right, other_top, other_foot in boxes[:number]:
                gaps = (other_left - right, left - other_right, other_top - foot, top - other_foot)
                assert max(gaps) >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_solid_fills_its_box(kind: str) -> None:
    solid = Solid(kind, "green", 8.0, 1.0, 16.0, False)
    image_HWC = paint_solids([solid], np.full((128, 128, 3), 0.5))
    rows, columns = np.nonzero(image_HWC[..., 1] - image_HWC[..., 0] > 0.1)
    assert rows.max() + 1 == pytest.approx(solid.row, abs=1)
    assert rows.min() == pytest.approx(solid.row - 16, abs=1)
    assert 12 <= columns.max() + 1 - columns.min() <= 17
    assert (columns.max() + 1 + columns.min()) / 2 == pytest.approx(16, abs=1)
