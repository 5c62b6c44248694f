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
    "train/owl/deep-er/d.png",
    "train/owl/deep/er/e.png",
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
    assert (task.num_train, task.num_val, task.num_classes) == (6, 2, 3)
    expected = ImageFolder(root / "train")
    assert isinstance(task.train, ImageSet)
    images = task.train.images
    assert list(images.classes) == expected.classes
    found = [(str(images.root / file), label) for file, label in zip(images.files, images.labels, strict=True)]
    assert found == expected.samples


def test_links_to_folders_elsewhere_are_followed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "own/x.png")
    write_image(elsewhere / "finch/deep/y.png")
    (root / "train/owl/more").symlink_to(elsewhere / "own")
    (root / "train/finch").symlink_to(elsewhere / "finch")
    (root / "train/jay/one.jpg").symlink_to(elsewhere / "own/x.png")
    # In val it is seen as well, which is not this function's to say; and the root may be behind a link.
    (root / "val/finch").symlink_to(elsewhere / "finch")
    linked = elsewhere / "linked"
    linked.symlink_to(root)
    task = build_image_folder(str(linked))
    assert isinstance(task.train, ImageSet)
    files, labels = task.train.images.files, task.train.images.labels
    expected = ImageFolder(linked / "train").samples
    assert [(f"{linked}/{file}", label) for file, label in zip(files, labels, strict=True)] == expected
    assert {"train/owl/more/x.png", "train/finch/deep/y.png", "train/jay/one.jpg"} < set(files)


@pytest.mark.parametrize(
    ("link", "target", "problem"),
    [
        # Into itself, the split, the root; to what is read anyway, before and after it; around what is read.
        ("train/owl/loop", "../owl", r"in which it lies itself"),
        ("train/owl/deep/loop", "../..", r"in which it lies itself"),
        ("train/owl/loop", "../../..", r"in which it lies itself"),
        ("train/owl/loop", "/", r", in which it lies itself"),
        ("train/zoo", "../train", r"in which it lies itself"),
        ("train/Auk/loop", "../owl/deep", r"whose images are read through {root}/train/owl/deep too"),
        ("train/owl/loop", "../Auk", r"whose images are read through {root}/train/Auk too"),
        ("train/zoo", "jay", r"whose images are read through {root}/train/jay too"),
        ("val/Auk/loop", "../owl", r"whose images are read through {root}/val/owl too"),
    ],
)
def test_links_that_lead_back_are_named(
    root: Path, tmp_path_factory: pytest.TempPathFactory, link: str, target: str, problem: str
) -> None:
    (root / link).symlink_to(target)
    with pytest.raises(UserError, match=rf"^{root}/{link}: this link leads to .*{problem.format(root=root)}; remove"):
        build_image_folder(str(root))
    # A link above the split is not to blame.
    above = tmp_path_factory.mktemp("above") / "linked"
    above.symlink_to(root)
    with pytest.raises(UserError, match=rf"^{above}/{link}: this link"):
        build_image_folder(str(above))


def test_of_two_links_to_the_same_folder_one_is_named(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "outer/inner/x.png")
    (root / "train/Auk/one").symlink_to(elsewhere / "outer/inner")
    (root / "train/owl/two").symlink_to(elsewhere / "outer")
    with pytest.raises(UserError, match=r"train/owl/two: .*outer/inner, whose .* through .*train/Auk/one too"):
        build_image_folder(str(root))


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
