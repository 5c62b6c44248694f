import json
from pathlib import Path
from typing import Any

import pytest

from spt_dist import UserError
from spt_dist.data.image_set import ImageSet
from spt_dist.data.lists.fgvc import FGVC_SETS, FgvcSet, build_fgvc, read_fgvc_list
from tests.data.pictures_for_tests import write_image

BIRDS = FgvcSet(4, "images", "Birds")
# The classes of CUB's authors start at 1; here some are left out and none is in order.
ANNOTATIONS: dict[str, dict[str, Any]] = {
    "train": {"007.Jay/a.jpg": 7, "002.Auk/b.jpg": 2, "010.Owl/c.jpg": 10, "003.Tit/d.jpg": 3},
    "val": {"010.Owl/e.jpg": 10, "003.Tit/f.jpg": 3},
    "test": {"002.Auk/g.jpg": 2, "007.Jay/h.jpg": 7, "010.Owl/i.jpg": 10, "003.Tit/j.jpg": 3},
}


def write(folder: Path, annotations: dict[str, dict[str, Any]], images: str = "images") -> Path:
    for split, files in annotations.items():
        for seed, file in enumerate(files):
            write_image(folder / images / file, seed)
        (folder / f"{split}.json").write_text(json.dumps(files))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "birds", ANNOTATIONS)


def published_labels(annotations: dict[str, Any]) -> list[int]:
    """As KMnP/vpt's JSONDataset numbers the classes of one list."""
    ids = sorted(set(annotations.values()))
    return [ids.index(found) for found in annotations.values()]


def test_files_and_labels_of_complete_lists_are_the_published_ones(folder: Path) -> None:
    for split in ("train", "test"):
        images = read_fgvc_list(folder, split, BIRDS)
        assert images.files == list(ANNOTATIONS[split])
        assert images.labels == published_labels(ANNOTATIONS[split])
        assert images.root == folder / "images"
        # Sorted as numbers: as text 10 would come first.
        assert images.classes == ("2", "3", "7", "10")


def test_a_list_without_all_classes_has_the_same_numbers(folder: Path) -> None:
    assert read_fgvc_list(folder, "val", BIRDS).labels == [3, 1]
    assert published_labels(ANNOTATIONS["val"]) == [1, 0]


def test_classes_may_have_names(tmp_path: Path) -> None:
    annotations = {
        split: {file: f"n{found:02d}" for file, found in files.items()} for split, files in ANNOTATIONS.items()
    }
    images = read_fgvc_list(write(tmp_path, annotations), "test", BIRDS)
    assert images.classes == ("n02", "n03", "n07", "n10")
    assert images.labels == published_labels(ANNOTATIONS["test"])


@pytest.mark.parametrize(("name", "images", "num_classes"), [
    ("cub", "images", 200), ("nabirds", "images", 555), ("flowers", ".", 102), ("dogs", "Images", 120),
    ("cars", ".", 196),
])  # fmt: skip
def test_the_five_data_sets(tmp_path: Path, name: str, images: str, num_classes: int) -> None:
    """Folders as the published classes' get_imagedir has them, classes as in the published configs."""
    files = {f"class/{number:04d}.jpg": number + 1 for number in range(num_classes)}
    for split in ("train", "val", "test"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{split}.json").write_text(json.dumps(files))
    (tmp_path / name / images / "class").mkdir(parents=True)
    for file in files:
        (tmp_path / name / images / file).touch()
    task = build_fgvc(str(tmp_path), name)
    assert (task.num_train, task.num_val, task.num_classes) == (num_classes, num_classes, num_classes)
    assert isinstance(task.train, ImageSet)
    assert task.train.num_workers == 4
    assert FGVC_SETS[name].num_classes == num_classes


def test_another_number_of_classes_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"birds: its lists have 4 classes instead of 5"):
        read_fgvc_list(folder, "train", FgvcSet(5, "images", "Birds"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"train\.json: is no JSON"),
        ("[]", r"train\.json: has to be a JSON object from paths to classes, not list"),
        ('{"a.jpg": 1.5}', r"train\.json: entry 1: the class 1\.5 of 'a\.jpg' has to be a number or a name"),
        ('{"a.jpg": true}', "has to be a number or a name"),
        ('{"a.jpg": null}', "has to be a number or a name"),
        ('{"a.jpg": 2, "b.jpg": 3, "a.jpg": 2}', r"train\.json: 'a\.jpg' is in the list twice"),
        ('{"a.jpg": "2"}', "birds: some lists have numbers as classes and some names"),
        ("{}", r"train\.json: lists no image"),
        ('{"../a.jpg": 2}', r"train\.json: entry 1: '\.\./a\.jpg' leads out of .*images"),
        ('{"002.Auk/b.jpg": 2, "002.Auk//b.jpg": 2}', "entry 2: .* is in the list already"),
        ('{"002.Auk/b.jpg": 2, "none.jpg": 2}', r"entry 2: .*images/none\.jpg is missing"),
    ],
)
def test_what_is_no_list_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / "train.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_fgvc_list(folder, "train", BIRDS)


def test_a_list_that_is_not_there_or_unknown(folder: Path) -> None:
    with pytest.raises(UserError, match="list of an FGVC data set='dev' is unknown; known: train, val, test"):
        read_fgvc_list(folder, "dev", BIRDS)
    (folder / "val.json").unlink()
    with pytest.raises(UserError, match=r"val\.json: can't be read"):
        read_fgvc_list(folder, "train", BIRDS)
    with pytest.raises(UserError, match=r"data\.data_set='cubs' is unknown; did you mean 'cub'"):
        build_fgvc(str(folder), "cubs")
