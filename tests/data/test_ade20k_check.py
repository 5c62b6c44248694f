"""What a copy of ADE20K is reported to have, against plain loops over the files."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spt_dist.data.scenes import make_scenes
from spt_dist.errors import UserError

pytestmark = [pytest.mark.segmentation, pytest.mark.filterwarnings("ignore::UserWarning:mm")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, to be read only."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "root", 5, 3, size=40, show_progress=False)


@pytest.fixture
def root(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes, to be damaged."""
    return shutil.copytree(scenes, tmp_path / "root")


def row_of(text: str, name: str) -> list[str]:
    """The cells of a table's row behind its name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def count_by_loop(masks: list[Path]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for path in masks:
        with Image.open(path) as mask:
            for value in mask.tobytes():
                counts[value] = counts.get(value, 0) + 1
    return counts


def test_counts_are_those_of_the_files(scenes: Path) -> None:
    from spt_dist.data.ade20k_check import check_ade20k, summarise

    reports = check_ade20k(scenes, num_threads=2, show_progress=False)
    text = summarise(reports)
    counts = [count_by_loop(sorted((scenes / "annotations" / split).iterdir())) for split in ("training", "validation")]
    pixels = [sum(count.values()) for count in counts]
    for report, count in zip(reports, counts, strict=True):
        assert report.problems == []
        assert report.counts_K.shape == (151,)
        assert {value: number for value, number in enumerate(report.counts_K) if number} == count
    assert row_of(text, "images") == ["5", "3"]
    assert row_of(text, "masks") == ["5", "3"]
    assert row_of(text, "problems") == ["0", "0"]
    assert row_of(text, "pixels in good masks") == [f"{number:,}" for number in pixels]
    shares = [f"{count.get(0, 0) / number:.1%}" for count, number in zip(counts, pixels, strict=True)]
    assert row_of(text, 'share of "other"') == shares
    occur = [str(len(count.keys() - {0})) for count in counts]
    assert row_of(text, "classes that occur, of 150") == occur
    total = {value: counts[0].get(value, 0) + counts[1].get(value, 0) for value in {*counts[0], *counts[1]} - {0}}
    ranking = sorted(total, key=lambda value: -total[value])[:10]
    below = text.partition("the most frequent classes")[2]
    assert [int(value) for value in re.findall(r"^│ (\d+) ", below, re.MULTILINE)] == ranking
    first = ranking[0]
    name = {1: "wall", 2: "building", 3: "sky", 4: "floor", 5: "tree", 6: "ceiling", 9: "windowpane", 15: "door"}
    name |= {22: "water", 29: "rug", 33: "fence", 47: "sand"}
    wanted = [f"{count.get(first, 0) / number:.1%}" for count, number in zip(counts, pixels, strict=True)]
    assert row_of(below, f"{first} {name[first]}") == wanted


def test_other_numbers_than_the_released_are_noted(scenes: Path) -> None:
    from spt_dist.data.ade20k_check import SplitReport, check_ade20k, summarise

    text = summarise(check_ade20k(scenes, 1, show_progress=False))
    assert "note: 5 training images; the released ADE20K has 20,210" in text
    assert "note: 3 validation images; the released ADE20K has 2,000" in text
    nothing = np.zeros(151, dtype=np.int64)
    released = [
        SplitReport("training", 20_210, 20_210, nothing, [], ()),
        SplitReport("validation", 2_000, 0, nothing, [], ()),
    ]
    assert "note" not in summarise(released)


def test_all_that_is_wrong_is_listed(root: Path) -> None:
    from spt_dist.data.ade20k_check import check_ade20k, summarise

    images, masks = root / "images/training", root / "annotations/training"
    (masks / "ADE_train_00000001.png").unlink()
    (images / "ADE_train_00000002.jpg").unlink()
    cut_off = images / "ADE_train_00000003.jpg"
    cut_off.write_bytes(cut_off.read_bytes()[:-20])
    odd = root / "annotations/validation/ADE_val_00000002.png"
    mask = np.asarray(Image.open(odd)).copy()
    mask[3, 4] = 177
    Image.fromarray(mask).save(odd)
    training, validation = check_ade20k(root, num_threads=3, show_progress=False)
    assert training.problems == [
        f"{images}/ADE_train_00000001.jpg: has no mask",
        f"{masks}/ADE_train_00000002.png: has no image",
        f"{cut_off}: its end is missing, {cut_off.stat().st_size:,} bytes are there",
    ]
    assert validation.problems == [f"{odd}: has the value 177; a mask's values are 0 to 150"]
    assert (training.num_images, training.num_masks) == (4, 4)
    # Only good pairs are counted.
    good = [masks / f"ADE_train_0000000{number}.png" for number in (4, 5)]
    assert {value: number for value, number in enumerate(training.counts_K) if number} == count_by_loop(good)
    assert row_of(summarise([training, validation]), "problems") == ["3", "1"]


def test_no_good_mask_at_all(root: Path) -> None:
    from spt_dist.data.ade20k_check import check_ade20k, summarise

    for path in (root / "annotations").rglob("*.png"):
        path.write_bytes(b"")
    reports = check_ade20k(root, 1, show_progress=False)
    assert [len(report.problems) for report in reports] == [5, 3]
    assert row_of(summarise(reports), 'share of "other"') == ["0.0%", "0.0%"]


def test_missing_folder_is_found_before_files_are_read(root: Path) -> None:
    from spt_dist.data.ade20k_check import check_ade20k

    shutil.rmtree(root / "annotations/validation")
    with pytest.raises(UserError, match=r"annotations/validation: no such folder; the root has to be the folder"):
        check_ade20k(root, 1, show_progress=False)
    with pytest.raises(UserError, match=r"nowhere: no such folder; ADE20K unpacks to ADEChallengeData2016"):
        check_ade20k(root / "nowhere", 1, show_progress=False)
