"""What a check of lists of images finds, and what is known of the published ones."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from spt_dist.data.catalogue import fgvc_set, fgvc_sets, image_folder, vtab_task, vtab_tasks
from spt_dist.data.lists.fgvc import FGVC_SETS
from spt_dist.data.lists.vtab import VTAB_TASKS
from spt_dist.data.lists_check import Report, SplitReport, check_lists, summarise
from spt_dist.data.shards.sources import source_of_lists
from spt_dist.errors import UserError
from tests.data.pictures_for_tests import write_image

SIZES = {"train800": 9, "val200": 4, "test": 6}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VTAB's task kitti, of four classes, the last of which no list has."""
    folder = tmp_path / "vtab" / "kitti"
    lines: dict[str, list[str]] = {}
    for split, size in SIZES.items():
        lines[split] = [f"images/{split}/{place}.png {place % 3}" for place in range(size)]
        for place in range(size):
            write_image(folder / f"images/{split}/{place}.png", place)
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for split, listed in lines.items():
        (folder / f"{split}.txt").write_text("\n".join(listed))
    return tmp_path / "vtab"


def check(root: Path) -> Report:
    return check_lists(vtab_task(root, "kitti"), num_threads=2, show_progress=False)


def row_of(text: str, name: str) -> list[str]:
    """The cells of a table's row behind its name."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    (row,) = [row for row in rows if row[0] == name]
    return row[1:]


def test_counts_are_those_of_the_lists(root: Path) -> None:
    report = check(root)
    text = summarise(report)
    assert report.problems == []
    assert [split.name for split in report.splits] == ["train800", "val200", "train800val200", "test"]
    wanted = {}
    for split in report.splits:
        listed = (root / "kitti" / f"{split.name}.txt").read_text().splitlines()
        wanted[split.name] = [sum(line.endswith(f" {k}") for line in listed) for k in range(4)]
        assert split.counts_K is not None
        assert split.counts_K.tolist() == wanted[split.name]
        assert split.num_samples == len(listed)
    assert row_of(text, "samples") == ["9", "4", "13", "6"]
    assert row_of(text, "classes") == ["4"] * 4
    assert row_of(text, "classes without samples") == ["1"] * 4
    assert row_of(text, "samples a class, fewest") == ["0"] * 4
    assert row_of(text, "samples a class, mean") == ["2.2", "1.0", "3.2", "1.5"]
    assert row_of(text, "samples a class, most") == ["3", "2", "5", "2"]
    assert row_of(text, "problems") == ["0"] * 4
    for k in range(4):
        assert row_of(text, str(k)) == [str(counts[k]) for counts in wanted.values()]
    assert [line for line in text.splitlines() if line.startswith("note")] == [
        "note: 9 samples in train800; as published there are 800",
        "note: 4 samples in val200; as published there are 200",
        "note: 13 samples in train800val200; as published there are 1,000",
        "note: 6 samples in test; as published there are 711",
    ]


def test_only_the_rarest_of_many_classes_are_shown() -> None:
    names = tuple(f"class {k}" for k in range(60))
    counts_K = np.arange(60, 0, -1)
    split = SplitReport("train", counts_K, names, ())
    text = summarise(Report(fgvc_set(Path("x"), "cub"), (split,), ()))
    assert "samples of the 50 rarest classes" in text
    assert row_of(text, "59 class 59") == ["1"]
    assert row_of(text, "10 class 10") == ["50"]
    assert "class 9 " not in text


def test_bad_images_are_named(root: Path) -> None:
    images = root / "kitti/images"
    cut_off, page = images / "test/1.png", images / "val200/2.png"
    cut_off.write_bytes(cut_off.read_bytes()[:-40])
    page.write_text("<html></html>")
    report = check(root)
    by_split = {split.name: split.problems for split in report.splits}
    assert by_split["train800"] == ()
    assert by_split["val200"] == by_split["train800val200"]
    assert by_split["val200"][0].startswith(f"{page}: is no image")
    assert by_split["test"][0].startswith(f"{cut_off}: can't be decoded")
    assert len(report.problems) == 3
    assert row_of(summarise(report), "problems") == ["0", "1", "1", "1"]


@pytest.mark.parametrize(
    ("split", "line", "problem"),
    [
        ("test", "images/test/0.png 4", r"test\.txt:7: class 4 of 'images/test/0\.png' has to lie between 0 and 3"),
        ("test", "images/test/0.png 1", r"test\.txt:7: 'images/test/0\.png' is in the list already"),
        ("val200", "images/nowhere.png 1", r"val200\.txt:5: .*images/nowhere\.png is missing"),
        ("train800", "images/test/0.png", r"train800\.txt:10: .* has to be a path, a blank and a class"),
    ],
)
def test_a_list_that_is_wrong_does_not_hide_the_others(root: Path, split: str, line: str, problem: str) -> None:
    path = root / "kitti" / f"{split}.txt"
    path.write_text(path.read_text() + f"\n{line}\n")
    (root / "kitti/images/train800/3.png").write_bytes(b"x")
    report = check(root)
    found = {one.name: one for one in report.splits}
    assert found[split].counts_K is None
    assert found[split].num_samples == 0
    assert any(re.search(problem, text) for text in found[split].problems), found[split].problems
    assert found["train800val200"].num_samples == 13
    assert len(found["train800val200"].problems) == 1
    text = summarise(report)
    sizes = SIZES | {"train800val200": 13}
    assert row_of(text, "samples") == [str(sizes[name]) for name in found if name != split]
    assert f" in {split};" not in text


def test_splits_that_share_images(root: Path) -> None:
    path = root / "kitti/val200.txt"
    path.write_text(path.read_text() + "\nimages/test/5.png 1\nimages/train800/0.png 0\nimages/train800/1.png 1\n")
    problems = check(root).problems
    assert problems == [
        f"{root}/kitti: 2 images are in train800 and in val200: images/train800/0.png, images/train800/1.png",
        f"{root}/kitti: 1 images are in val200 and in test: images/test/5.png",
    ]
    path.write_text(path.read_text() + "".join(f"images/train800/{n}.png 0\n" for n in (2, 3, 4)))
    assert check(root).problems[0].endswith("train800/0.png, images/train800/1.png, images/train800/2.png, ...")


def test_which_data_sets_are_there(root: Path) -> None:
    assert vtab_tasks(root) == ["kitti"]
    (root / "cifar").mkdir()
    assert vtab_tasks(root) == ["cifar", "kitti"]
    with pytest.raises(UserError, match="vtab: has none of the folders cub, nabirds, flowers, dogs, cars"):
        fgvc_sets(root)
    with pytest.raises(UserError, match=r"kitty.*kitti"):
        vtab_task(root, "kitty")
    with pytest.raises(UserError, match=r"birds.*nabirds"):
        fgvc_set(root, "birds")


def test_fine_grained_sets(tmp_path: Path) -> None:
    folder = tmp_path / "flowers"
    for split, first in (("train", 0), ("val", 102), ("test", 204)):
        files = {f"{split}/{n}.png": n % 102 + 1 for n in range(first, first + 102)}
        for file in files:
            write_image(folder / file, 0, (8, 8))
        (folder / f"{split}.json").write_text(json.dumps(files))
    listed = fgvc_set(tmp_path, "flowers")
    report = check_lists(listed, 2, show_progress=False)
    assert report.problems == []
    assert [split.num_samples for split in report.splits] == [102] * 3
    assert "note: 102 samples in test; as published there are 6,149" in summarise(report)
    source = source_of_lists(listed.read_all())
    assert source.splits["val"][0] == ("val/102.png", 0)
    assert source.classes[:2] == ("1", "2")


def test_folders(tmp_path: Path) -> None:
    for seed, file in enumerate(("train/cat/0.png", "train/dog/1.png", "train/dog/2.png", "val/dog/3.png")):
        write_image(tmp_path / file, seed)
    report = check_lists(image_folder(tmp_path), 1, show_progress=False)
    assert report.problems == []
    assert [(split.name, list(split.counts_K)) for split in report.splits] == [("train", [1, 2]), ("val", [0, 1])]  # type: ignore[arg-type]
    write_image(tmp_path / "test/cow/4.png", 4)
    (problem,) = check_lists(image_folder(tmp_path), 1, show_progress=False).problems
    assert problem.startswith(f"{tmp_path}/test/cow: 1 of the classes here are none")
    with pytest.raises(UserError, match="nowhere/train: has to be a folder"):
        image_folder(tmp_path / "nowhere")


def test_folders_that_share_images(tmp_path: Path) -> None:
    for seed in range(6):
        write_image(tmp_path / f"train/cat/{seed}.png", seed)
    write_image(tmp_path / "val/cat/9.png", 9)
    write_image(tmp_path / "test/cat/copied.png", 9)
    # The name alone says nothing, nor does it that files are damaged alike; twice in one split is allowed.
    write_image(tmp_path / "val/cat/0.png", 10)
    for split in ("train", "val"):
        (tmp_path / split / "cat/empty.png").touch()
    write_image(tmp_path / "train/cat/again.png", 5)
    (tmp_path / "val/cat/linked.png").symlink_to(tmp_path / "train/cat/4.png")
    write_image(tmp_path / "train/cat/deep/elsewhere.png", 7)
    (tmp_path / "val/cat/folder").symlink_to(tmp_path / "train/cat/deep")
    report = check_lists(image_folder(tmp_path), 2, show_progress=False)
    assert [split.problems for split in report.splits] == [
        (f"{tmp_path}/train/cat/empty.png: is empty",),
        (f"{tmp_path}/val/cat/empty.png: is empty",),
        (),
    ]
    assert list(report.overlaps) == [
        f"{tmp_path}: 2 images are in train and in val: train/cat/4.png is val/cat/linked.png, "
        "train/cat/deep/elsewhere.png is val/cat/folder/elsewhere.png",
        f"{tmp_path}: 1 images are in val and in test: val/cat/9.png is test/cat/copied.png",
    ]


def test_links_that_lead_back_are_found(tmp_path: Path) -> None:
    for seed, file in enumerate(("train/a/0.png", "train/a/1.png", "train/b/2.png", "val/b/3.png")):
        write_image(tmp_path / file, seed)
    (tmp_path / "train/a/loop").symlink_to("../a")
    (problem,) = check_lists(image_folder(tmp_path), 1, show_progress=False).problems
    assert problem.startswith(f"{tmp_path}/train/a/loop: this link leads to ")


def test_equal_pictures_of_published_lists_are_no_mistake(root: Path) -> None:
    """dSprites shows some shapes alike under several angles."""
    images = root / "kitti/images"
    (images / "test/0.png").write_bytes((images / "train800/0.png").read_bytes())
    assert check(root).problems == []


def test_published_numbers() -> None:
    # By arithmetic, where the definition of a data set gives a number.
    parts = {task: {part.splits: part.num_samples for part in vtab_task(Path(), task).published} for task in VTAB_TASKS}
    assert all(part[("train800",)] + part[("val200",)] == part[("train800val200",)] == 1000 for part in parts.values())
    counts = {task: part[("test",)] for task, part in parts.items()}
    assert len(counts) == 19
    assert counts["dtd"] == 47 * 40  # 120 images a class, a third of them for testing
    assert counts["caltech101"] == 9_144 - 102 * 30  # 30 a class are for training
    assert counts["smallnorb_azi"] == counts["smallnorb_ele"] == 24_300 // 2  # the test set, halved
    assert counts["dsprites_loc"] == counts["dsprites_ori"] == 737_280 // 10
    assert counts["eurosat"] == 27_000 // 5
    assert counts["resisc45"] == 31_500 // 5
    assert counts["oxford_flowers102"] == 8_189 - 2 * 1_020
    assert counts["patch_camelyon"] == 2**15
    fgvc = {name: sum(part.num_samples for part in fgvc_set(Path(), name).published) for name in FGVC_SETS}
    # All images of each.
    assert fgvc == {"cub": 11_788, "cars": 16_185, "dogs": 20_580, "flowers": 8_189, "nabirds": 0}
