"""Digits, photographs and textures: held-out pictures share nothing with those trained on, and labels are right.

Shape suffixes: H rows, W columns, C colours.
"""

import builtins
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from spt_dist.data.mini import digits, photos, textures
from spt_dist.data.mini.photos import PHOTOS, blocks_of, draw_patch, load_photo
from spt_dist.errors import UserError


def test_each_digit_is_in_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits that a picture is made of, by their pixels."""
    placed: list[bytes] = []
    original = digits._placed

    def watched(digit_HW: npt.NDArray[np.float64], *pose: float) -> Any:
        placed.append((digit_HW * 16).astype(np.uint8).tobytes())
        return original(digit_HW, *pose)

    monkeypatch.setattr(digits, "_placed", watched)
    draw = digits.digits_task()
    known = load_digits()
    label_of = {
        image.astype(np.uint8).tobytes(): label for image, label in zip(known.images, known.target, strict=True)
    }
    seen: dict[str, set[bytes]] = {}
    middles: list[bytes] = []
    for split, size in (("train", 800), ("val", 200), ("test", 797)):
        placed.clear()
        for number in range(size):
            start = len(placed)
            _, label = draw(np.random.default_rng(number), split, number)
            assert label == label_of[placed[start]]
            middles.append(placed[start])
        seen[split] = set(placed)
    assert len(middles) == len(known.target) == 1797
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    assert not seen["train"] & seen["val"]


def test_a_digit_stands_where_it_is_placed() -> None:
    """Not mirrored, and its centre of mass where asked for."""
    digit_HW = np.zeros((8, 8))
    digit_HW[1:7, 2] = 1
    digit_HW[6, 2:6] = 1
    share_HW = digits._placed(digit_HW, 24, 16, 16.0, 14.0, 0.0)
    rows_HW, columns_HW = np.indices((32, 32)) + 0.5
    small_rows, small_columns = np.nonzero(digit_HW)
    assert (share_HW * rows_HW).sum() / share_HW.sum() == pytest.approx(16 + 3 * (small_rows.mean() + 0.5 - 4), abs=0.3)
    assert (share_HW * columns_HW).sum() / share_HW.sum() == pytest.approx(
        14 + 2 * (small_columns.mean() + 0.5 - 4), abs=0.3
    )


@pytest.mark.parametrize("shape", [(512, 512, 3), (191, 384, 3), (300, 451), (427, 640, 3)])
def test_splits_are_parted_by_pixels(shape: tuple[int, ...]) -> None:
    """Each pixel of a photograph says where it is; patches are read back to pixels."""
    pixels = {}
    for split in ("train", "val", "test"):
        owner_HW = np.zeros(shape[:2], dtype=bool)
        for top, left in blocks_of(shape, split):
            assert top + photos.BLOCK <= shape[0]
            assert left + photos.BLOCK <= shape[1]
            owner_HW[top : top + photos.BLOCK, left : left + photos.BLOCK] = True
        pixels[split] = owner_HW
    assert not (pixels["train"] & pixels["test"]).any()
    assert not (pixels["val"] & pixels["test"]).any()
    assert not (pixels["train"] & pixels["val"]).any()
    assert pixels["val"].any()
    assert 0.6 < (pixels["train"] | pixels["val"]).sum() / pixels["test"].sum() < 1.7


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_patches_lie_in_blocks_of_their_split(split: str) -> None:
    """A photograph that is white where the split's blocks are, black elsewhere: its patches are white."""
    photo = np.zeros((300, 420, 3), dtype=np.uint8)
    for top, left in blocks_of(photo.shape, split):
        photo[top : top + photos.BLOCK, left : left + photos.BLOCK] = 255
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert draw_patch(rng, photo, split, 30).min() == 255


def test_photographs_are_there_and_reduced() -> None:
    pytest.importorskip("skimage")
    for name in PHOTOS.values():
        photo = load_photo(name)
        assert photo.dtype == np.uint8
        assert photo.shape[2:] == (3,)
        assert max(photo.shape) <= 640
        assert all(blocks_of(photo.shape, split) for split in ("train", "val", "test"))


@pytest.mark.parametrize(
    ("name", "package", "library"),
    [("chelsea", "skimage", "scikit-image"), ("china.jpg", "sklearn", "scikit-learn")],
)
def test_without_its_library_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, library: str
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"'{name}' comes with {library}, .*pip install 'spt_dist\[mini\]'"):
        load_photo(name)


def mean_frequency(image_HWC: npt.NDArray[np.uint8]) -> float:
    """Where a picture's spectrum has its middle, on a logarithmic scale: natural log of cycles a pixel."""
    grey_HW = image_HWC.astype(float).mean(axis=-1)
    window = np.hanning(32)
    power_HW = np.abs(np.fft.fft2((grey_HW - grey_HW.mean()) * window[:, None] * window[None])) ** 2
    frequency_HW = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)[None])
    band = (frequency_HW > 1 / 24) & (frequency_HW < 0.4)
    return float((power_HW[band] * np.log(frequency_HW[band])).sum() / power_HW[band].sum())


def test_coarser_grades_have_lower_frequencies() -> None:
    draw = textures.grades_task()
    found: dict[int, list[float]] = {grade: [] for grade in range(5)}
    for number in range(300):
        image_HWC, grade = draw(np.random.default_rng((2, number)), "train", number)
        found[grade].append(mean_frequency(image_HWC))
    means = np.array([np.mean(values) for values in found.values()])
    # Steps of log 16/3 over five grades, 0.335 each, but for what noise and sharp edges add.
    assert (np.diff(means) < -0.15).all()
    assert all(np.std(values) < 0.3 for values in found.values())


def test_no_texture_is_told_by_brightness_or_contrast() -> None:
    pytest.importorskip("skimage")
    draw = textures.textures_task()
    greys: dict[int, list[npt.NDArray[np.float64]]] = {label: [] for label in range(12)}
    for number in range(600):
        image_HWC, label = draw(np.random.default_rng((1, number)), "test", number)
        greys[label].append(image_HWC.mean(axis=-1))
    assert min(len(values) for values in greys.values()) > 25
    brightness = np.array([np.mean(values) for values in greys.values()])
    contrast = np.array([np.mean([grey_HW.std() for grey_HW in values]) for values in greys.values()])
    assert brightness.std() < 10
    assert contrast.std() / contrast.mean() < 0.15


def test_textures_of_a_kind_differ_and_names_are_many() -> None:
    assert len(set(textures.TEXTURES)) == 12
    for name, paint in textures._PAINTERS.items():
        shares = [
            paint(np.random.default_rng(seed), *textures._turned_grid(np.random.default_rng(seed))) for seed in (0, 1)
        ]
        assert all(share_HW.shape == (32, 32) and share_HW.std() > 0.05 for share_HW in shares), name
        assert not np.allclose(*shares)
