"""The loaders that are compared do equal work: each makes the same images, and all of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from _loading import IMAGE_FOLDER, LOADERS, ONLY_READ, OURS_ONLY_READ, Reading, make_data
from loading import Pass, measure, rows_of

NUM_IMAGES = 24
SIZE = 32
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("photographs")
    make_data(made, NUM_IMAGES)
    return made


def files_of(folder: Path) -> list[tuple[Path, int]]:
    """Every photograph with its label."""
    classes = sorted(path for path in (folder / "files" / "train").iterdir())
    return [(path, label) for label, each in enumerate(classes) for path in sorted(each.iterdir())]


def by_hand(path: Path) -> np.ndarray:
    """Decoded, resized and normalised, in double precision."""
    pixels = np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)


def test_photographs_have_realistic_sizes_and_differ(folder: Path) -> None:
    images = [Image.open(path) for path, _ in files_of(folder)]
    assert len(images) == NUM_IMAGES
    assert all(400 <= max(image.size) <= 500 and min(image.size) >= 264 for image in images)
    assert len({image.tobytes() for image in images}) == NUM_IMAGES
    assert len(list((folder / "shards").glob("*.tar"))) == 12


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", [name for name in LOADERS if name not in (ONLY_READ, OURS_ONLY_READ)])
def test_every_loader_makes_the_same_batches(name: str, num_workers: int, folder: Path) -> None:
    batches = list(LOADERS[name](Reading(folder, num_workers, batch_size=5, image_size=SIZE)))
    assert all(inputs.dtype == torch.float32 and len(inputs) == len(targets) <= 5 for inputs, targets in batches)
    found = [each for inputs, targets in batches for each in zip(inputs.numpy(), targets.tolist(), strict=True)]
    wanted = [(by_hand(path), label) for path, label in files_of(folder)]
    assert len(found) == NUM_IMAGES
    nearest = [min(range(NUM_IMAGES), key=lambda at: np.abs(wanted[at][0] - image).max()) for image, _ in found]
    assert sorted(nearest) == list(range(NUM_IMAGES))
    assert nearest != sorted(nearest), "it is not shuffled"
    for at, (image, label) in zip(nearest, found, strict=True):
        assert label == wanted[at][1]
        np.testing.assert_allclose(image, wanted[at][0], atol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", [ONLY_READ, OURS_ONLY_READ])
def test_what_is_only_read_is_read_in_full(name: str, num_workers: int, folder: Path) -> None:
    batches = LOADERS[name](Reading(folder, num_workers, batch_size=5))
    found = [each for sizes, labels in batches for each in zip(sizes.tolist(), labels.tolist(), strict=True)]
    assert sorted(found) == sorted((path.stat().st_size, label) for path, label in files_of(folder))


def test_a_pass_is_measured_with_its_workers(folder: Path) -> None:
    measured = measure(IMAGE_FOLDER, Reading(folder, 1, batch_size=5, image_size=SIZE))
    # Decoding alone takes a millisecond of an image in the worker.
    assert measured.cpu > 0.5
    assert measured.rate > 0


def test_ratios_are_those_of_one_repeat() -> None:
    of = {name: [Pass(10.0, 1.0), Pass(20.0, 2.0), Pass(40.0, 3.0)] for name in LOADERS}
    of["webdataset"] = [Pass(20.0, 1.0), Pass(20.0, 1.0), Pass(20.0, 1.0)]
    of[OURS_ONLY_READ] = [Pass(30.0, 1.0), Pass(60.0, 1.0), Pass(120.0, 1.0)]
    rows = {row[1]: row for row in rows_of({(2, name): passes for name, passes in of.items()})}
    assert rows[IMAGE_FOLDER] == ["2", IMAGE_FOLDER, "20", "10 - 40", "1.00", "2.00"]
    assert rows["webdataset"][4] == "1.00"
    assert rows[OURS_ONLY_READ][2:5] == ["60", "30 - 120", "3.00"]
