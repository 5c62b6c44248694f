from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from spt_dist import UserError
from spt_dist.data.image_set import ImageSet
from spt_dist.data.lists.image_folder import build_image_folder
from tests.data.pictures_for_tests import write_image

FILES = (
    "train/owl/b.jpg",
    "train/owl/deep/a.PNG",
    "train/Auk/c.webp",
    "train/jay/a.jpeg",
    "val/owl/a.jpg",
    "val/Auk/b.bmp",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, file in enumerate(FILES):
        write_image(tmp_path / file, seed)
    (tmp_path / "train/owl/notes.txt").write_text("no image, and not called like one")
    return tmp_path


def test_files_and_labels_are_those_of_torchvision(root: Path) -> None:
    task = build_image_folder(str(root))
    assert (task.num_train, task.num_val, task.num_classes) == (4, 2, 3)
    expected = ImageFolder(root / "train")
    assert isinstance(task.train, ImageSet)
    images = task.train.images
    assert list(images.classes) == expected.classes
    found = [(str(images.root / file), label) for file, label in zip(images.files, images.labels, strict=True)]
    assert found == expected.samples


def test_held_out_classes_have_the_numbers_of_training(root: Path) -> None:
    """By themselves Auk and owl would be 0 and 1."""
    task = build_image_folder(str(root))
    assert isinstance(task.val, ImageSet)
    assert dict(zip(task.val.images.files, task.val.images.labels, strict=True)) == {
        "val/owl/a.jpg": 2,
        "val/Auk/b.bmp": 0,
    }


def test_a_class_that_does_not_train_is_refused(root: Path) -> None:
    write_image(root / "val/wren/a.jpg")
    with pytest.raises(UserError, match="val/wren: 1 of the classes here are none that training images have"):
        build_image_folder(str(root))


def test_missing_or_empty_folders_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match="/dev: has to be a folder with a folder of images for each class"):
        build_image_folder(str(root), val="dev")
    (root / "empty/owl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"/empty: has no images \(\.jpg, "):
        build_image_folder(str(root), val="empty")
    (root / "bare").mkdir()
    with pytest.raises(UserError, match="/bare: has to be a folder with a folder"):
        build_image_folder(str(root), train="bare")
