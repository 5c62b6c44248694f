"""Panels: what they show, where, and which images get one.

Shape suffixes: H height, W width, C colour channels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from spt_dist.data.task import Task
from tests.evaluation.segmentation_for_tests import CLASSES, PALETTE, SIZES, SLIDE, FakeSet, TinyNet
from tests.ranks import run_ranks

pytest.importorskip("mmseg")
from spt_dist.evaluation.panels import make_panel, write_panels
from spt_dist.evaluation.segmentation import predict

pytestmark = pytest.mark.segmentation
CPU = torch.device("cpu")


def coloured(labels_HW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Each pixel in its class's colour, by a loop."""
    picture_HWC = np.zeros((*labels_HW.shape, 3), dtype=np.uint8)
    for label, colour in enumerate(PALETTE):
        picture_HWC[labels_HW == label] = colour
    return picture_HWC


def find(part_HWC: NDArray[np.uint8], panel_HWC: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Rows and columns at which a picture stands in a panel, pixel by pixel."""
    height, width, _ = part_HWC.shape
    rows, columns = panel_HWC.shape[0] - height + 1, panel_HWC.shape[1] - width + 1
    fits = np.ones((rows, columns), dtype=bool)
    for y, x in [(0, 0), (height - 1, 0), (0, width - 1), (height - 1, width - 1), (height // 2, width // 2)]:
        fits &= (panel_HWC[y : y + rows, x : x + columns] == part_HWC[y, x]).all(axis=-1)
    return [
        (int(y), int(x))
        for y, x in np.argwhere(fits)
        if np.array_equal(panel_HWC[y : y + height, x : x + width], part_HWC)
    ]


def swatches(panel_HWC: NDArray[np.uint8], below: int) -> list[tuple[int, ...]]:
    """Colours of the patches in the legend, in the order of reading: at least 8 pixels in a row, 8 rows high."""
    patches = np.lib.stride_tricks.sliding_window_view(panel_HWC[below:], (8, 8), axis=(0, 1))
    is_plain = (patches.max(axis=(-2, -1)) == patches.min(axis=(-2, -1))).all(axis=-1)
    seen = [tuple(patches[y, x, :, 0, 0].tolist()) for y, x in np.argwhere(is_plain)]
    return [colour for colour in dict.fromkeys(seen) if colour != (255, 255, 255)]


def samples(height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.integer], NDArray[np.integer]]:
    """A picture, its labels and a prediction; sky covers most, then ignored pixels, drawers, wall and floor."""
    rng = np.random.default_rng(0)
    picture_HWC = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    truth_HW, prediction_HW = np.full((height, width), 2), np.full((height, width), 2)
    truth_HW[: height // 4] = 255
    truth_HW[height // 2 :, : width // 3] = 1
    prediction_HW[height // 4 : height // 2, : width // 3] = 0
    prediction_HW[-height // 16 :, -width // 8 :] = 3
    return picture_HWC, truth_HW, prediction_HW


@pytest.mark.parametrize(("size", "factor"), [((96, 72), 4), ((64, 250), 2), ((321, 64), 1)])
def test_pictures_stand_side_by_side_enlarged_by_a_whole_number(size: tuple[int, int], factor: int) -> None:
    picture_HWC, truth_HW, prediction_HW = samples(*size)
    panel_HWC = np.asarray(make_panel(picture_HWC, truth_HW, prediction_HW, PALETTE, CLASSES))
    places = []
    for part_HWC in (picture_HWC, coloured(truth_HW), coloured(prediction_HW)):
        (place,) = find(part_HWC.repeat(factor, axis=0).repeat(factor, axis=1), panel_HWC)
        places.append(place)
    assert len({row for row, _ in places}) == 1
    columns = [column for _, column in places]
    assert columns[1] - columns[0] == columns[2] - columns[1] > factor * size[1]
    # Above are the titles.
    for column in columns:
        assert (panel_HWC[: places[0][0], column : column + 60] != 255).any()


def test_legend_names_what_occurs_the_largest_first() -> None:
    picture_HWC, truth_HW, prediction_HW = samples(96, 96)
    panel_HWC = np.asarray(make_panel(picture_HWC, truth_HW, prediction_HW, PALETTE, CLASSES))
    ((top, _),) = find(coloured(truth_HW).repeat(4, axis=0).repeat(4, axis=1), panel_HWC)
    wanted = [tuple(PALETTE[2]), (0, 0, 0), *(tuple(PALETTE[label]) for label in (1, 0, 3))]
    assert swatches(panel_HWC, top + 4 * 96) == wanted


def test_large_pictures_are_reduced_and_labels_are_not_mixed() -> None:
    picture_HWC, truth_HW, prediction_HW = samples(2000, 1500)
    picture_HWC[:] = 77
    panel_HWC = np.asarray(make_panel(picture_HWC, truth_HW, prediction_HW, PALETTE, CLASSES))
    assert panel_HWC.shape[0] < 800
    assert 3 * 480 < panel_HWC.shape[1] < 3 * 480 + 60
    ((top, left),) = find(np.full((640, 480, 3), 77, dtype=np.uint8), panel_HWC)
    for place, labels_HW in enumerate((truth_HW, prediction_HW), start=1):
        start = left + place * ((panel_HWC.shape[1] - left) // 3)
        shown_HWC = panel_HWC[top : top + 640, start : start + 480]
        assert {tuple(colour) for colour in shown_HWC.reshape(-1, 3).tolist()} == {
            (0, 0, 0) if label == 255 else tuple(PALETTE[label]) for label in np.unique(labels_HW)
        }


def test_many_classes_take_several_rows_and_none_is_cut_off() -> None:
    num_classes = 150
    palette = [[label, 255 - label, (7 * label) % 256] for label in range(num_classes)]
    classes = [f"class number {label}" for label in range(num_classes)]
    labels_HW = np.arange(160 * 40).reshape(160, 40) % num_classes
    picture_HWC = np.zeros((160, 40, 3), dtype=np.uint8)
    panel_HWC = np.asarray(make_panel(picture_HWC, labels_HW, labels_HW, palette, classes))
    found = swatches(panel_HWC, 22 + 8 + 2 * 160)
    assert set(found) >= {tuple(colour) for colour in palette}
    # White all round: nothing reaches the edge.
    for edge in (panel_HWC[:4], panel_HWC[-4:], panel_HWC[:, :4], panel_HWC[:, -4:]):
        assert (edge == 255).all()


def make_task() -> Task:
    held_out: Any = FakeSet(SIZES)
    return Task(held_out, held_out, len(SIZES), len(SIZES), len(CLASSES), "segmentation")


def write(folder: str, count: int) -> list[Path]:
    """Panels by a tiny model; every rank finds all files there."""
    model = TinyNet(SLIDE)
    paths = write_panels(model, model, make_task(), CPU, folder, count, scales=(1.0, 0.5), flip=True)
    assert all(path.is_file() for path in paths)
    return paths


@pytest.mark.distributed
@pytest.mark.parametrize(("count", "wanted"), [(3, [0, 1, 3]), (9, [0, 1, 2, 3, 4]), (0, [])])
def test_panels_of_images_from_all_over_the_set(tmp_path: Path, count: int, wanted: list[int]) -> None:
    paths = [tmp_path / "panels" / f"ADE_val_{index + 1:08d}.png" for index in wanted]
    assert run_ranks(write, 2, str(tmp_path / "panels"), count, timeout=60) == [paths, paths]
    assert sorted(tmp_path.rglob("*.*")) == paths
    model, held_out = TinyNet(SLIDE).eval(), FakeSet(SIZES)
    for index, path in zip(wanted, paths, strict=True):
        views, label_HW = held_out.views([1.0, 0.5])[index]
        prediction_HW = predict(model, model, views, label_HW.shape, flip=True)
        panel = make_panel(held_out.picture(index), label_HW.numpy(), prediction_HW.numpy(), PALETTE, CLASSES)
        with Image.open(path) as written:
            assert written.format == "PNG"
            assert np.array_equal(np.asarray(written), np.asarray(panel))
