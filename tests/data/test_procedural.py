"""The procedurally drawn images: repeatable, labelled, balanced, and really drawn.

Shape suffixes: N images, H rows, W columns, C colour channels.
"""

import numpy as np
import pytest

from spt_dist.data.procedural import CLASSES, draw_images


def test_shapes_and_dtypes() -> None:
    images_NHWC, labels_N = draw_images(50, seed=0)
    assert images_NHWC.shape == (50, 32, 32, 3)
    assert images_NHWC.dtype == np.uint8
    assert labels_N.shape == (50,)
    assert labels_N.dtype == np.int64


def test_same_seed_gives_same_images() -> None:
    first, second = draw_images(90, seed=3), draw_images(90, seed=3)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_other_seed_gives_other_images_and_order() -> None:
    images_NHWC, labels_N = draw_images(90, seed=3)
    other_images_NHWC, other_labels_N = draw_images(90, seed=4)
    assert (labels_N != other_labels_N).any()
    for image_HWC in images_NHWC:
        assert not (other_images_NHWC == image_HWC).all(axis=(1, 2, 3)).any()


def test_every_class_is_drawn_equally_often() -> None:
    _, labels_N = draw_images(3 * len(CLASSES) + 1, seed=1)
    counts = np.bincount(labels_N, minlength=len(CLASSES))
    assert len(counts) == len(CLASSES)
    assert counts.min() == 3
    assert counts.max() == 4


def test_class_names_are_unique() -> None:
    assert 30 <= len(CLASSES) <= 45
    assert len(set(CLASSES)) == len(CLASSES)


def test_each_class_shows_a_figure_on_its_background() -> None:
    images_NHWC, labels_N = draw_images(20 * len(CLASSES), seed=5)
    for label, name in enumerate(CLASSES):
        grey_NHW = images_NHWC[labels_N == label].astype(np.float32).mean(axis=-1)
        # Noise has a standard deviation of at most 18 of 255, so a blank image cannot reach this contrast.
        spread_N = np.quantile(grey_NHW, 0.99, axis=(1, 2)) - np.quantile(grey_NHW, 0.01, axis=(1, 2))
        assert np.median(spread_N) > 80, name


def test_images_of_a_class_differ() -> None:
    images_NHWC, labels_N = draw_images(4 * len(CLASSES), seed=6)
    for label in range(len(CLASSES)):
        same_NHWC = images_NHWC[labels_N == label]
        assert len(np.unique(same_NHWC.reshape(len(same_NHWC), -1), axis=0)) == len(same_NHWC)


def test_images_come_in_colour_and_in_grey() -> None:
    images_NHWC, _ = draw_images(200, seed=7)
    mean_colour_NC = images_NHWC.astype(np.float32).mean(axis=(1, 2))
    tint_N = mean_colour_NC.max(axis=1) - mean_colour_NC.min(axis=1)
    assert (tint_N < 3).sum() > 40
    assert (tint_N > 20).sum() > 40


@pytest.mark.parametrize(("num_images", "seed", "name"), [(0, 0, "num_images is 0"), (1, -2, "seed is -2")])
def test_bad_arguments_are_named(num_images: int, seed: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        draw_images(num_images, seed)
