"""What a check of shards finds, and indices for shards that others have written."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from spt_dist.data.shards.check import check_shards, summarise
from spt_dist.data.shards.convert import convert
from spt_dist.data.shards.foreign import index_shards, read_classes
from spt_dist.data.shards.index import ShardIndex
from spt_dist.data.shards.sources import Source
from spt_dist.errors import UserError
from tests.data.shards.sources_for_tests import picture, write_source

PATTERNS = {"train": "train-*.tar", "val": "val-*.tar"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Files to be read only."""
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def shards(source: Source, tmp_path: Path) -> Path:
    """Five shards of training samples and two of test samples, to be damaged."""
    convert(source, tmp_path / "shards", num_threads=1, shard_size=5, show_progress=False)
    return tmp_path / "shards"


def problems_of(shards: Path) -> list[str]:
    return [problem for report in check_shards(str(shards), 2, False) for problem in report.problems]


def test_good_shards(shards: Path) -> None:
    reports = check_shards(str(shards), num_threads=2, show_progress=False)
    assert [report.problems for report in reports] == [(), ()]
    rows = {
        cells[0]: cells[1:]
        for line in summarise(str(shards), reports).splitlines()
        if line.startswith("│")
        for cells in [[cell.strip() for cell in line.strip("│").split("│")]]
    }
    assert rows["shards"] == ["5", "2"]
    assert rows["samples"] == ["23", "7"]
    sizes = [sum(path.stat().st_size for path in shards.glob(f"{split}-*.tar")) for split in ("train", "test")]
    assert rows["bytes"] == [f"{size:,}" for size in sizes]
    assert rows["problems"] == ["0", "0"]


def content_place(path: Path, number: int) -> int:
    """Where the content of a tar file's member begins."""
    with tarfile.open(path) as tar:
        return tar.getmembers()[number].offset_data


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def swap(path: Path) -> None:
    other = path.with_name("train-000004.tar")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (Path.unlink, ["PATH: can't be read (No such file or directory)"]),
    "cut off in a content": (
        lambda path: path.write_bytes(path.read_bytes()[: content_place(path, 4) + 10]),
        ["PATH: it is cut off in the content of", "PATH: is not the file of the index: number of bytes"],
    ),
    "cut off between members": (
        lambda path: path.write_bytes(path.read_bytes()[: content_place(path, 4) - 512]),
        ["PATH: it is cut off at byte", "PATH: is not the file of the index: number of bytes"],
    ),
    "without its end": (
        lambda path: path.write_bytes(path.read_bytes()[:-512]),
        ["PATH: is not the file of the index: number of bytes 19,968, not 20,480, its sha256 differs"],
    ),
    "bit flipped in an image": (
        lambda path: flip(path, content_place(path, 4) + 60),
        ["PATH: sample 3 (key ", "PATH: is not the file of the index: its sha256 differs"],
    ),
    "bit flipped in a label": (
        lambda path: flip(path, content_place(path, 5)),
        ["PATH: sample 3 (key ", "PATH: is not the file of the index: its sha256 differs"],
    ),
    "bit flipped in a name": (
        lambda path: flip(path, content_place(path, 4) - 512),
        ["PATH: the header at byte", "PATH: is not the file of the index: number of samples 2, not 5"],
    ),
    "bit flipped between members": (
        lambda path: flip(path, content_place(path, 4) - 513),
        ["PATH: is not the file of the index: its sha256 differs"],
    ),
    "something behind its end": (
        lambda path: path.write_bytes(path.read_bytes() + bytes(512)),
        ["PATH: is not the file of the index: number of bytes"],
    ),
    "a web page": (
        lambda path: path.write_text("<html>404</html>"),
        ["PATH: it is", "PATH: is not the file of the index: number of bytes 16, not"],
    ),
    "empty": (lambda path: path.write_bytes(b""), ["PATH: it is empty"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(shards: Path, damage: str) -> None:
    path = shards / "train-000001.tar"
    change, wanted = DAMAGES[damage]
    change(path)
    problems = problems_of(shards)
    for text in wanted:
        assert any(problem.startswith(text.replace("PATH", str(path))) for problem in problems), problems
    assert all(str(path) in problem for problem in problems)


def test_shards_of_the_same_size_that_are_swapped(shards: Path) -> None:
    path, other = shards / "train-000001.tar", shards / "train-000004.tar"
    assert path.stat().st_size == other.stat().st_size
    swap(path)
    problems = problems_of(shards)
    for name in (path, other):
        assert f"{name}: is not the file of the index: its sha256 differs" in problems
        differing = [text for text in problems if text.startswith(f"{name}: sample ") and "checksum differs" in text]
        assert len(differing) == 5


def write_foreign(folder: Path, split: str, samples: list[dict[str, object]], per_shard: int = 3) -> list[Path]:
    """Shards as webdataset writes them: other headers, owners and times."""
    folder.mkdir(exist_ok=True)
    paths = []
    for start in range(0, len(samples), per_shard):
        path = folder / f"{split}-{start // per_shard:04d}.tar"
        with wds.TarWriter(str(path)) as tar:
            for sample in samples[start : start + per_shard]:
                tar.write(sample)
        paths.append(path)
    return paths


def labelled(count: int, **more: object) -> list[dict[str, object]]:
    return [{"__key__": f"x/{n}", "png": picture(n), "cls": n % 3, **more} for n in range(count)]


def test_foreign_shards_get_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    paths = write_foreign(folder, "train", labelled(7, json={"a": 1})) + write_foreign(folder, "val", labelled(2))
    (folder / "test-0.tar").write_bytes(b"not asked for")
    index = index_shards(folder, ("a", "b", "c"), PATTERNS, num_threads=2, show_progress=False)
    assert index == ShardIndex.load(str(folder))
    assert (index.kind, index.classes) == ("classification", ("a", "b", "c"))
    assert [shard.num_samples for shard in index.splits["train"].shards] == [3, 3, 1]
    shards = [shard for split in ("train", "val") for shard in index.splits[split].shards]
    assert [shard.name for shard in shards] == [path.name for path in paths]
    for shard, path in zip(shards, paths, strict=True):
        assert (shard.num_bytes, shard.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert problems_of(folder) == []
    with pytest.raises(UserError, match=r"foreign/index\.json: is there already; remove it"):
        index_shards(folder, ("a", "b", "c"), PATTERNS, 1, False)


def test_bad_samples_in_foreign_shards(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    bad = {3: {"cls": b"3"}, 5: {"cls": b"-1"}, 6: {"cls": b"one"}}
    for place, change in bad.items():
        samples = [sample | change if n == place else sample for n, sample in enumerate(labelled(7))]
        (path, *_) = [write_foreign(folder, "train", samples)[place // 3]]
        with pytest.raises(UserError, match=rf"{path}: sample {place % 3 + 1} \(key x/{place}\): its .*; only shards"):
            index_shards(folder, "abc", {"train": "train-*.tar"}, 1, False)
        assert not (folder / "index.json").exists()
    without = [{key: value for key, value in sample.items() if key != "png"} for sample in labelled(2)]
    path = write_foreign(folder, "val", without)[0]
    with pytest.raises(UserError, match=rf"{path}: sample 1 \(key x/0\): it has 0 images, not one \(and 1 more\)"):
        index_shards(folder, "abc", {"val": "val-*.tar"}, 1, False)
    path = write_foreign(folder, "odd", [{"__key__": "0", "png": picture(0), "txt": "cat"}])[0]
    with pytest.raises(UserError, match=rf"{path}: its first sample has neither a \.cls nor a \.seg\.png"):
        index_shards(folder, "abc", {"val": "odd-*.tar"}, 1, False)
    with pytest.raises(UserError, match=r"foreign: has no file 'none-\*', which the shards of 'val' are called by"):
        index_shards(folder, "abc", {"val": "none-*"}, 1, False)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        index_shards(tmp_path / "nowhere", "abc", PATTERNS, 1, False)
    path.write_bytes(write_foreign(folder, "cut", labelled(3))[0].read_bytes()[:-9000])
    with pytest.raises(UserError, match=f"{path}: it is cut off"):
        index_shards(folder, "abc", {"val": "odd-*.tar"}, 1, False)


def test_a_name_that_no_index_can_have(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    write_foreign(folder, "train", labelled(2))[0].rename(folder / "train 1.tar")
    with pytest.raises(UserError, match=r"name='train 1\.tar' has to be a file name of letters"):
        index_shards(folder, "abc", {"train": "train*.tar"}, 1, False)
    assert not (folder / "index.json").exists()


def test_images_are_decoded_and_labels_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    cut_off = picture(1, size=64)[:-200]
    samples = [sample | ({"png": cut_off} if n == 1 else {}) for n, sample in enumerate(labelled(3))]
    write_foreign(folder, "train", samples)
    index_shards(folder, "abc", {"train": "train-*.tar"}, 1, False)
    (problem,) = problems_of(folder)
    assert problem.startswith(f"{folder}/train-0000.tar: sample 2 (key x/1): can't be decoded")
    # The index says there are fewer classes.
    fields = json.loads((folder / "index.json").read_text())
    fields["classes"] = ["a", "b"]
    (folder / "index.json").write_text(json.dumps(fields))
    assert f"{folder}/train-0000.tar: sample 3 (key x/2): its class is 2, but the classes are 0 to 1" in problems_of(
        folder
    )


def mask(size: tuple[int, int], value: int, mode: str = "L") -> bytes:
    file = BytesIO()
    Image.fromarray(np.full(size[::-1], value, dtype=np.uint8)).convert(mode).save(file, "PNG")
    return file.getvalue()


def test_masks(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    masks = [mask((8, 8), 3), mask((8, 8), 4), mask((8, 9), 0), mask((8, 8), 1, "RGB"), b"nothing"]
    samples = [{"__key__": f"{n}", "png": picture(n), "seg.png": content} for n, content in enumerate(masks)]
    write_foreign(folder, "val", samples, per_shard=9)
    assert index_shards(folder, "abc", {"val": "val-*.tar"}, 1, False).kind == "segmentation"
    wanted = [
        "has the value 4; a mask's values are 0 to 3",
        "has 8 x 9 pixels, but its image 8 x 8",
        "has mode 'RGB'; a mask has one channel of 8 bits (mode 'L')",
    ]
    problems = problems_of(folder)
    names = [f"{folder}/val-0000.tar: sample {n + 1} (key {n}): its mask" for n in range(5)]
    assert problems[:3] == [f"{name} {text}" for name, text in zip(names[1:4], wanted, strict=True)]
    assert problems[3].startswith(f"{names[4]}: is no image")
    assert len(problems) == 4


def test_classes(tmp_path: Path) -> None:
    assert read_classes("3") == ("0", "1", "2")
    (tmp_path / "names").write_text("cat\ndog \n")
    assert read_classes(str(tmp_path / "names")) == ("cat", "dog")
    (tmp_path / "empty").write_text("cat\n\ndog\n")
    for value, match in (("0", "at least 1"), ("x", "no number, and no file"), (str(tmp_path / "empty"), "empty line")):
        with pytest.raises(UserError, match=match):
            read_classes(value)


def test_behind_a_command(shards: Path) -> None:
    location = f"pipe:cat {shards}/{{}}"
    assert [report.problems for report in check_shards(location, 2, False)] == [(), ()]
    (shards / "test-000001.tar").unlink()
    (first, *_) = [problem for report in check_shards(location, 2, False) for problem in report.problems]
    assert first.startswith(f"pipe:cat {shards}/test-000001.tar: ")


@pytest.mark.segmentation
@pytest.mark.filterwarnings("ignore::UserWarning:mm")
def test_ade20k(tmp_path: Path) -> None:
    from spt_dist.data.scenes import make_scenes
    from spt_dist.data.shards.sources import source_of_ade20k

    root = make_scenes(tmp_path / "root", 5, 3, size=40, show_progress=False)
    out = tmp_path / "out"
    index = convert(source_of_ade20k(root), out, num_threads=2, shard_size=2, show_progress=False).index
    assert index.kind == "segmentation"
    assert (len(index.classes), index.classes[:3]) == (150, ("wall", "building", "sky"))
    assert problems_of(out) == []
    for split, folder in (("train", "training"), ("val", "validation")):
        found = set()
        for shard in index.splits[split].shards:
            for sample in wds.WebDataset(str(out / shard.name), shardshuffle=False):
                assert sample.keys() >= {"jpg", "seg.png"}
                found.add((sample["jpg"], sample["seg.png"]))
        images = sorted((root / "images" / folder).iterdir())
        masks = sorted((root / "annotations" / folder).iterdir())
        assert found == {(image.read_bytes(), mask.read_bytes()) for image, mask in zip(images, masks, strict=True)}
    broken = masks[1]
    shutil.copy(masks[0], tmp_path / "kept")
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=f"^{broken}: can't be decoded .*; mend it, or leave out"):
        convert(source_of_ade20k(root), tmp_path / "other", num_threads=1, show_progress=False)
    broken.unlink()
    with pytest.raises(UserError, match=r"has no mask; `python launch/prepare_data\.py ade20k --check .*` lists all"):
        source_of_ade20k(root)
