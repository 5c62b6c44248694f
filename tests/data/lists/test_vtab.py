from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import transforms as v1
from torchvision.datasets.folder import default_loader
from torchvision.transforms import InterpolationMode

from spt_dist import UserError
from spt_dist.data.image_set import ImageSet
from spt_dist.data.lists.vtab import SPLITS, VTAB_TASKS, build_vtab, read_vtab_list
from tests.data.pictures_for_tests import write_image

NUM_CLASSES = 4


def make_task(root: Path, task: str = "kitti", sizes: tuple[int, ...] = (8, 2, 10, 5)) -> Path:
    """A task as NOAH's get_vtab1k.py writes it."""
    folder = root / task
    for seed, (split, size) in enumerate(zip(("train800", "val200", "train800val200", "test"), sizes, strict=True)):
        lines = []
        for number in range(size):
            file = f"images/{split}/{number:06d}.jpg"
            write_image(folder / file, seed=100 * seed + number)
            lines.append(f"{file} {(number * 7 + seed) % NUM_CLASSES}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_task(tmp_path)


def rewrite(folder: Path, content: str | bytes) -> Path:
    path = folder / "train800.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def published(folder: Path, split: str) -> list[tuple[Tensor, int]]:
    """As the public readers go through a list, with the transforms of SPT's."""
    transform = v1.Compose(
        [
            v1.Resize((224, 224), interpolation=InterpolationMode.BICUBIC),
            v1.CenterCrop(224),
            v1.ToTensor(),
            v1.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    samples = []
    for line in (folder / f"{split}.txt").read_text().splitlines():
        parts = line.split(" ")
        samples.append((transform(default_loader(str(folder / parts[0]))), int(parts[1])))
    return samples


def test_a_task_has_the_samples_of_the_published_code(tmp_path: Path, folder: Path) -> None:
    task = build_vtab(str(tmp_path), "kitti", num_workers=0)
    assert (task.num_train, task.num_val, task.num_classes, task.kind) == (10, 5, 4, "classification")
    for dataset, split in ((task.train, "train800val200"), (task.val, "test")):
        assert isinstance(dataset, ImageSet)
        expected = published(folder, split)
        assert len(dataset) == len(expected)
        for index, (image, label) in enumerate(expected):
            item, found = dataset.item(None, index)
            assert torch.equal(dataset.finish([item], None, [index])[0], image)
            assert found == label


def test_other_lists_can_be_chosen(tmp_path: Path, folder: Path) -> None:
    task = build_vtab(str(tmp_path), "kitti", train="train800", val="val200", image_size=16)
    assert (task.num_train, task.num_val) == (8, 2)
    assert isinstance(task.val, ImageSet)
    assert task.val.images.name == str(folder / "val200.txt")


def test_the_nineteen_tasks() -> None:
    groups = [task.group for task in VTAB_TASKS.values()]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
    # What KMnP/vpt's tune_vtab.py has; 940 in all.
    published = {"caltech101": 102, "cifar": 100, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37}
    published |= {"patch_camelyon": 2, "sun397": 397, "svhn": 10, "resisc45": 45, "eurosat": 10, "dmlab": 6, "kitti": 4}
    published |= {"smallnorb_azi": 18, "smallnorb_ele": 9, "dsprites_loc": 16, "dsprites_ori": 16, "clevr_dist": 6}
    published |= {"clevr_count": 8, "diabetic_retinopathy": 5}
    assert {name: task.num_classes for name, task in VTAB_TASKS.items()} == published
    assert sum(published.values()) == 940


def test_marks_ends_of_lines_and_blank_lines_are_no_matter(folder: Path) -> None:
    plain = read_vtab_list(folder, "train800", NUM_CLASSES)
    text = (folder / "train800.txt").read_text()
    rewrite(folder, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n \r\n")
    assert read_vtab_list(folder, "train800", NUM_CLASSES) == plain


def test_a_path_may_have_blanks(folder: Path) -> None:
    write_image(folder / "images/a b/c d.jpg")
    rewrite(folder, "images/a b/c d.jpg 3\n")
    images = read_vtab_list(folder, "train800", NUM_CLASSES)
    assert (images.files, images.labels) == (["images/a b/c d.jpg"], [3])


@pytest.mark.parametrize(
    "line", ["images/test/000001.jpg", "images/test/000001.jpg ", "3", "a.jpg -1", "a.jpg 1.0", "a.jpg 1_0", "a.jpg ١"]
)
def test_a_line_without_path_and_class_is_named(folder: Path, line: str) -> None:
    path = rewrite(folder, f"images/train800/000000.jpg 1\n\n{line}\n")
    with pytest.raises(UserError) as error:
        read_vtab_list(folder, "train800", NUM_CLASSES)
    assert str(error.value) == f"{path}:3: {line!r} has to be a path, a blank and a class"


def test_a_class_out_of_range_is_named(folder: Path) -> None:
    rewrite(folder, "images/train800/000000.jpg 3\nimages/train800/000001.jpg 4\n")
    with pytest.raises(UserError, match=r"train800\.txt:2: class 4 of 'images.*01\.jpg' has to lie between 0 and 3"):
        read_vtab_list(folder, "train800", NUM_CLASSES)


@pytest.mark.parametrize(
    "file", ["../secret.jpg", "images/../../secret.jpg", "/etc/passwd", "C:/a.jpg", "images/..", "a\0.jpg"]
)
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, file: str) -> None:
    write_image(folder.parent / "secret.jpg")
    rewrite(folder, f"images/train800/000000.jpg 1\n{file} 1\n")
    with pytest.raises(UserError, match=r"train800\.txt:2: .* leads out of .*kitti"):
        read_vtab_list(folder, "train800", NUM_CLASSES)


@pytest.mark.parametrize("again", ["images/train800/000000.jpg", "images//train800/./000000.jpg"])
def test_a_file_that_is_listed_twice_is_refused(folder: Path, again: str) -> None:
    path = rewrite(folder, f"images/train800/000000.jpg 1\nimages/train800/000001.jpg 1\n{again} 1\n")
    with pytest.raises(UserError, match=rf"train800\.txt:3: .* is in the list already \({path}:1\)"):
        read_vtab_list(folder, "train800", NUM_CLASSES)


def test_missing_files_are_an_error_at_the_start(tmp_path: Path, folder: Path) -> None:
    for number in (3, 6):
        (folder / f"images/train800val200/{number:06d}.jpg").unlink()
    (folder / "images/train800val200/000006.jpg").mkdir()
    with pytest.raises(UserError) as error:
        build_vtab(str(tmp_path), "kitti", skip_bad_samples=True)
    found = f"{folder}/train800val200.txt:4: {folder}/images/train800val200/000003.jpg is missing"
    assert str(error.value) == found + "; of 10 files 2 are"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_list_is_refused(folder: Path, content: str) -> None:
    path = rewrite(folder, content)
    with pytest.raises(UserError, match=f"^{path}: lists no image$"):
        read_vtab_list(folder, "train800", NUM_CLASSES)


def test_a_list_that_is_no_text_or_not_there(folder: Path) -> None:
    rewrite(folder, b"images/\xff\xfe.jpg 1\n")
    with pytest.raises(UserError, match=r"train800\.txt: is no text in UTF-8 .* at byte 7"):
        read_vtab_list(folder, "train800", NUM_CLASSES)
    (folder / "train800.txt").unlink()
    with pytest.raises(UserError, match=r"train800\.txt: can't be read \(No such file"):
        read_vtab_list(folder, "train800", NUM_CLASSES)


def test_unknown_names_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.task='kiti' is unknown; did you mean 'kitti'"):
        build_vtab(str(tmp_path), "kiti")
    with pytest.raises(UserError, match=r"list of a VTAB task='\.\./train800' is unknown; did you mean 'train800'"):
        build_vtab(str(tmp_path), "kitti", train="../train800")
    assert SPLITS == ("train800", "val200", "train800val200", "test")
