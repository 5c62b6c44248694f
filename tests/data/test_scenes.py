"""Drawn scenes: laid out as ADE20K, told by texture, and never half there.

Shape suffixes: H rows, W columns, C colours.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from spt_dist.data import scenes
from spt_dist.data.scenes import TEXTURES, draw_scene, make_scenes
from spt_dist.errors import UserError
from tests.launch.processes import snapshot


@pytest.fixture(scope="module")
def drawn() -> list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
    """Images and masks of 150 scenes."""
    return [draw_scene((7, number), 64) for number in range(150)]


def test_layout_is_that_of_ade20k(tmp_path: Path) -> None:
    root = make_scenes(tmp_path / "new" / "root", 3, 2, size=40, show_progress=False)
    wanted = {
        f"{kind}/{split}/ADE_{prefix}_{number:08d}.{suffix}"
        for split, prefix, count in (("training", "train", 3), ("validation", "val", 2))
        for number in range(1, count + 1)
        for kind, suffix in (("images", "jpg"), ("annotations", "png"))
    }
    assert set(snapshot(root)) == wanted
    for image in (root / "images").rglob("*.jpg"):
        with Image.open(image) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            size = picture.size
        mask = root / "annotations" / image.parent.name / f"{image.stem}.png"
        with Image.open(mask) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "L", size)
            assert set(np.unique(np.asarray(picture))) <= {0, *TEXTURES}
    # Not left as private as temporary folders are.
    umask = os.umask(0)
    os.umask(umask)
    assert root.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.segmentation
def test_classes_are_called_as_in_ade20k() -> None:
    from mmseg.datasets import ADE20KDataset

    names = ADE20KDataset.METAINFO["classes"]
    assert {label: names[label - 1] for label in TEXTURES} == {label: name for label, (name, _) in TEXTURES.items()}


def test_seed_says_it_all(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_train": 3, "num_val": 3, "size": 40, "show_progress": False}
    first, again, other = (
        snapshot(make_scenes(tmp_path / name, seed=seed, **options))
        for name, seed in (("first", 4), ("again", 4), ("other", 5))
    )
    assert first == again
    assert not set(first.values()) & set(other.values())
    assert len(set(first.values())) == len(first), "no scene is held out and trained on"
    longer = snapshot(make_scenes(tmp_path / "longer", seed=4, **options | {"num_train": 4}))
    assert first.items() < longer.items(), "more scenes are more scenes, not others"


def test_sizes_differ(drawn: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]) -> None:
    sizes = {mask_HW.shape for _, mask_HW in drawn}
    assert all(image_HWC.shape == (*mask_HW.shape, 3) for image_HWC, mask_HW in drawn)
    heights, widths = ({size[axis] for size in sizes} for axis in (0, 1))
    assert (min(heights), max(heights)) == (58, 70)
    assert min(widths) < 64
    assert max(widths) > 80
    assert any(height % 8 and width % 8 for height, width in sizes)


def test_every_class_and_other_occur(drawn: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]) -> None:
    counts = sum(np.bincount(mask_HW.ravel(), minlength=151) for _, mask_HW in drawn)
    assert set(np.flatnonzero(counts)) == {0, *TEXTURES}
    shares = counts[counts > 0] / counts.sum()
    assert shares.max() < 3 * shares.min(), "of similar shares, so that none is a good guess"
    numbers = [len(np.unique(mask_HW)) for _, mask_HW in drawn]
    assert min(numbers) >= 2
    assert np.mean(numbers) > 4


def pure_patches(image_HWC: npt.NDArray[np.uint8], mask_HW: npt.NDArray[np.uint8]) -> dict[int, Any]:
    """Class -> 12 x 12 pixels of it alone, ``(12, 12, 3)``, 0 to 1, for each class that has some."""
    found = {}
    for top in range(0, mask_HW.shape[0] - 12, 4):
        for left in range(0, mask_HW.shape[1] - 12, 4):
            labels = np.unique(mask_HW[top : top + 12, left : left + 12])
            if len(labels) == 1 and labels[0]:
                found[int(labels[0])] = image_HWC[top : top + 12, left : left + 12] / 255.0
    return found


def nearest_mean_accuracy(samples: list[tuple[int, Any]]) -> float:
    """Held-out accuracy of the nearest class mean, features divided by their spread."""
    labels = np.array([label for label, _ in samples])
    features = np.array([feature for _, feature in samples])
    features /= features.std(axis=0)
    half = len(labels) // 2
    classes = np.unique(labels)
    means = np.array([features[:half][labels[:half] == label].mean(axis=0) for label in classes])
    distances = np.linalg.norm(features[half:, None] - means[None], axis=-1)
    return float(np.mean(classes[distances.argmin(axis=1)] == labels[half:]))


def slopes(patch_HWC: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How the shade changes: mean squares of the differences, in four directions, over their sum; and the sum."""
    shade_HW = patch_HWC.mean(axis=-1)
    inner = shade_HW[1:-1, 1:-1]
    steps = [
        inner - shade_HW[:-2, 1:-1],
        inner - shade_HW[1:-1, :-2],
        inner - shade_HW[:-2, :-2],
        inner - shade_HW[:-2, 2:],
    ]
    squares = np.array([np.square(step).mean() for step in steps])
    return np.append(squares / squares.sum(), np.log(squares.sum()))


def test_texture_tells_the_class_and_colour_does_not(
    drawn: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]],
) -> None:
    patches = [item for image_HWC, mask_HW in drawn for item in pure_patches(image_HWC, mask_HW).items()]
    assert len(patches) > 400
    # Sky alone has no second colour, which its mean does not show.
    by_colour = nearest_mean_accuracy([(label, patch.mean(axis=(0, 1))) for label, patch in patches])
    by_slopes = nearest_mean_accuracy([(label, slopes(patch)) for label, patch in patches])
    assert by_colour < 2 / len(TEXTURES)
    assert by_slopes > 4 / len(TEXTURES)


def test_mirrored_texture_is_of_the_same_class(
    drawn: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]],
) -> None:
    """Training flips images: what rises in one scene falls in another, in each class."""
    leaning: dict[int, list[float]] = {label: [] for label in TEXTURES}
    for image_HWC, mask_HW in drawn:
        for label, patch in pure_patches(image_HWC, mask_HW).items():
            _, _, falling, rising, _ = slopes(patch)
            leaning[label].append(falling - rising)
    for label, values in leaning.items():
        falls = np.mean(np.array(values) > 0)
        assert 0.2 < falls < 0.8, f"{TEXTURES[label][0]}: {falls:.0%} of {len(values)} fall"
    assert np.mean(np.abs(leaning[33])) > 0.2, "a fence does lean"


def test_neither_colour_is_the_brighter_one(
    drawn: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]],
) -> None:
    """The thin lines of a window, the smaller part of it, are now light and now dark."""
    shades = [
        pure_patches(image_HWC, mask_HW)[9].mean(axis=-1)
        for image_HWC, mask_HW in drawn
        if 9 in pure_patches(image_HWC, mask_HW)
    ]
    lighter = np.mean([shade_HW.mean() > np.median(shade_HW) for shade_HW in shades])
    assert len(shades) > 20
    assert 0.25 < lighter < 0.75


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    assert (make_scenes(tmp_path / "root", 1, 1, 32, show_progress=False) / "images/training").is_dir()


@pytest.mark.parametrize("what", ["a file in it", "a file"])
def test_nothing_is_overwritten(tmp_path: Path, what: str) -> None:
    root = tmp_path / "root"
    if what == "a file":
        root.write_text("mine")
    else:
        root.mkdir()
        (root / "mine.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"root: is there already; scenes go into a new or an empty folder"):
        make_scenes(root, 1, 1, 32, show_progress=False)
    assert snapshot(tmp_path) == before


def test_nothing_is_left_of_an_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_later(seed: tuple[int, ...], size: int) -> Any:
        if seed[1:] == (1, 2):
            raise OSError(28, "No space left on device", "x")
        return draw_scene(seed, size)

    monkeypatch.setattr(scenes, "draw_scene", fail_later)
    with pytest.raises(OSError, match="No space"):
        make_scenes(tmp_path / "root", 2, 2, 32, show_progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0}, "--num-train 0: has to be at least 1"),
        ({"num_val": 0}, "--num-val 0: has to be at least 1"),
        ({"size": 31}, "--size 31: has to be at least 32"),
        ({"seed": -1}, "--seed -1: has to be 0 or more"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scenes(tmp_path / "root", show_progress=False, **options)
    assert list(tmp_path.iterdir()) == []
