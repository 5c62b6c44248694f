"""Conversion to shards: what is in them, and what becomes of them when it is interrupted."""

import hashlib
import json
import shutil
import subprocess
import tarfile
import zlib
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset as wds

from spt_dist.data.shards import convert as module
from spt_dist.data.shards.convert import convert
from spt_dist.data.shards.index import ShardIndex
from spt_dist.data.shards.journal import NAME, Journal
from spt_dist.data.shards.sources import Source
from spt_dist.data.shards.writer import write_shard
from spt_dist.errors import UserError
from tests.data.shards.sources_for_tests import CLASSES, picture, write_source
from tests.disks import mounted_disk
from tests.launch.processes import snapshot

SHARD_SIZE = 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Files to be read only."""
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion that nothing interrupted writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(source, out)
    return snapshot(out)


@pytest.fixture
def own_source(source: Source, tmp_path: Path) -> Source:
    """A copy, to be damaged."""
    return replace(source, root=shutil.copytree(source.root, tmp_path / "own"))


def run(source: Source, out: Path, num_threads: int = 1, shard_size: int = SHARD_SIZE, **options: int) -> ShardIndex:
    """Convert without a bar."""
    return convert(source, out, num_threads=num_threads, shard_size=shard_size, show_progress=False, **options).index


def interrupt(source: Source, out: Path, monkeypatch: pytest.MonkeyPatch, **options: bool) -> None:
    """Convert, but for the index."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, out, **options)


def members(path: Path) -> list[tuple[str, bytes]]:
    """Names and contents, by the standard library."""
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def test_a_shard_is_a_plain_tar_file(tmp_path: Path) -> None:
    samples = [[("0.png", b"x" * 512), ("0.cls", b"1")], [("7.png", b""), ("7.cls", b"02")]]
    shard = write_shard(tmp_path / "s.tar", samples)
    content = (tmp_path / "s.tar").read_bytes()
    assert members(tmp_path / "s.tar") == [member for sample in samples for member in sample]
    with tarfile.open(tmp_path / "s.tar") as tar:
        facts = {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in tar}
    assert facts == {(0, 0, 0, "", "", 0o644)}
    # Tapes had records of 20 blocks, and other programs still warn where the last one is cut off.
    assert len(content) == shard.num_bytes == 10240
    assert shard.name == "s.tar"
    assert shard.sha256 == hashlib.sha256(content).hexdigest()
    joined = [b"0.png\0" + b"x" * 512 + b"0.cls\0" + b"1", b"7.png\0" + b"7.cls\0" + b"02"]
    assert shard.checksums == b"".join(zlib.crc32(text).to_bytes(4, "little") for text in joined)
    assert shard.num_samples == 2


def test_every_file_is_in_the_shards_once_and_as_it_was(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = run(source, out)
    assert index == ShardIndex.load(str(out))
    assert (index.kind, index.classes) == ("classification", CLASSES)
    # 23 samples in 5 shards, 7 in 2: as equal as can be.
    assert [shard.num_samples for shard in index.splits["train"].shards] == [4, 5, 4, 5, 5]
    assert [shard.num_samples for shard in index.splits["test"].shards] == [3, 4]
    names = {shard.name for split in index.splits.values() for shard in split.shards}
    assert {path.name for path in out.iterdir()} == names | {"index.json"}
    for split, entries in source.splits.items():
        found = {}
        order = []
        for shard in index.splits[split].shards:
            content = members(out / shard.name)
            assert len(content) == 2 * shard.num_samples
            for (image_name, image), (label_name, label) in zip(content[::2], content[1::2], strict=True):
                key, _, extension = image_name.partition(".")
                assert label_name == f"{key}.cls"
                found[int(key)] = (extension, image, label)
                order.append(int(key))
        assert found == {
            place: ("jpeg" if file.endswith("JPEG") else "png", (source.root / file).read_bytes(), str(label).encode())
            for place, (file, label) in enumerate(entries)
        }
        assert (order == sorted(order)) == (split == "test")
        assert len(order) == len(entries)
        for shard in index.splits[split].shards:
            content_bytes = (out / shard.name).read_bytes()
            assert (shard.num_bytes, shard.sha256) == (len(content_bytes), hashlib.sha256(content_bytes).hexdigest())


def test_webdataset_reads_them(source: Source, tmp_path: Path) -> None:
    index = run(source, tmp_path)
    urls = [str(tmp_path / shard.name) for shard in index.splits["test"].shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    assert [sample["cls"] for sample in samples] == [label for _, label in source.splits["test"]]
    assert [sample["__key__"] for sample in samples] == [f"{place:08d}" for place in range(7)]
    for sample in samples:
        assert sample["png" if "png" in sample else "jpeg"].size == (8, 8)


def test_the_bytes_depend_on_nothing_else(source: Source, whole: dict[str, bytes], tmp_path: Path) -> None:
    run(source, tmp_path / "two", num_threads=2)
    assert snapshot(tmp_path / "two") == whole
    moved = replace(source, root=shutil.copytree(source.root, tmp_path / "moved"))
    run(moved, tmp_path / "three", num_threads=3)
    assert snapshot(tmp_path / "three") == whole
    run(source, tmp_path / "seed", seed=1)
    other = snapshot(tmp_path / "seed")
    assert other.keys() == whole.keys()
    changed = {name for name in whole if other[name] != whole[name]}
    assert changed == {"index.json"} | {name for name in whole if name.startswith("train-")}


@pytest.mark.parametrize("num_complete", [0, 1, 4, 7])
def test_goes_on_after_any_number_of_shards(
    source: Source, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_complete: int
) -> None:
    calls = 0

    def write_some(path: Path, samples: object) -> object:
        nonlocal calls
        calls += 1
        if calls > num_complete:
            # What a process that is killed in mid-write leaves.
            (path.parent / f".{path.name}.abc_1234").write_bytes(b"half")
            raise KeyboardInterrupt
        return write_shard(path, samples)  # type: ignore[arg-type]

    def write_no_index(path: Path, text: str) -> None:
        (path.parent / f".{path.name}.abc_1234").write_text(text[:20])
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", write_some)
        patch.setattr(module, "write_text", write_no_index)
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert not (out / "index.json").exists()
    written = 0

    def write_counted(path: Path, samples: object) -> object:
        nonlocal written
        written += 1
        return write_shard(path, samples)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_shard", write_counted)
    run(source, out, num_threads=2)
    assert snapshot(out) == whole
    assert written == 7 - num_complete


def test_what_is_not_known_to_be_complete_is_written_again(
    source: Source, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(source, out, monkeypatch)
    journal = (out / NAME).read_bytes()
    lines = journal.splitlines(keepends=True)
    assert len(lines) == 8
    # Cut off in the last line; of the shards in the others one is gone, and one has lost its end.
    (out / NAME).write_bytes(b"".join(lines[:7]) + lines[7][:30])
    first, second, *_ = (json.loads(line)["name"] for line in lines[1:])
    (out / first).unlink()
    (out / second).write_bytes((out / second).read_bytes()[:-512])
    # Twice, for what is noted next must not be joined to the line that was cut off.
    interrupt(source, out, monkeypatch)
    run(source, out)
    assert snapshot(out) == whole


def test_another_list_or_other_options_are_refused(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(source, out, monkeypatch)
    before = snapshot(out)
    file, label = source.splits["train"][3]
    assert isinstance(label, int)
    relabelled = [
        (file, (label + 1) % 3) if place == 3 else entry for place, entry in enumerate(source.splits["train"])
    ]
    swapped = list(reversed(source.splits["test"]))
    for other, options, what in (
        (replace(source, splits={**source.splits, "train": relabelled}), {}, r"list: [0-9a-f]{12}\.\.\. there"),
        (replace(source, splits={**source.splits, "test": swapped}), {}, r"list: "),
        (replace(source, classes=("cat", "dog", "eagle")), {}, r"list: "),
        (replace(source, splits={"train": source.splits["train"]}), {}, r"samples: \{'train': 23, 'test': 7\} there, "),
        (source, {"shard_size": 6}, r"\(shard size: 5 there, 6 now\)"),
        (source, {"seed": 6}, r"\(seed: 0 there, 6 now\)"),
    ):
        with pytest.raises(UserError, match=f"out: has the shards of an unfinished conversion of .*{what}"):
            run(other, out, **options)
        assert snapshot(out) == before


def test_folders_with_other_things_in_them_are_refused(source: Source, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    with pytest.raises(UserError, match="out: is there already; shards go into a new or an empty folder"):
        run(source, out)
    assert snapshot(out) == whole
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is there already"):
        run(source, tmp_path / "file")


def test_shards_and_source_lie_side_by_side(own_source: Source, tmp_path: Path) -> None:
    root = own_source.root
    before = snapshot(root)
    (tmp_path / "linked").symlink_to(root)
    for out in (root, root / "train/shards", tmp_path, tmp_path / "linked/shards", tmp_path / "own/../own/shards"):
        with pytest.raises(UserError, match=f"^--shards {out}: has to lie beside {root}, which is converted"):
            run(own_source, out)
    assert snapshot(root) == before
    # Not one in the other, though its name begins alike.
    run(own_source, tmp_path / "own-shards")


def test_one_conversion_at_a_time(source: Source, tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "out", {}),
        pytest.raises(UserError, match="out: another conversion is writing there; wait for it or end it"),
    ):
        run(source, tmp_path / "out")


def test_a_damaged_journal_is_named(source: Source, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / NAME).write_bytes(b"{}\n[1]\n")
    with pytest.raises(UserError, match=r"out/conversion\.jsonl: is damaged \(.*\); remove .*out and convert again"):
        run(source, tmp_path / "out")


def test_full_disk(source: Source, whole: dict[str, bytes], tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "disk", "48k") as disk:
        for _ in range(2):
            with pytest.raises(UserError, match=r"disk/out: can't be written \(No space left on device\); once it can"):
                run(source, disk / "out", num_threads=2)
            there = snapshot(disk / "out")
            there.pop(NAME)
            # Complete shards or nothing; and some are there, for three of ten kilobytes have room.
            assert there
            assert there.items() <= whole.items()
            assert "index.json" not in there
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        run(source, disk / "out")
        assert snapshot(disk / "out") == whole


@pytest.mark.parametrize(
    "content", [picture(1)[:-30], b"", b"<html></html>", None], ids=["cut off", "empty", "HTML", "missing"]
)
def test_bad_samples(own_source: Source, tmp_path: Path, content: bytes | None) -> None:
    out = tmp_path / "out"
    bad = own_source.root / own_source.splits["train"][4][0]
    good = bad.read_bytes()
    if content is None:
        bad.unlink()
    else:
        bad.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{bad}: .*; mend it, or leave out what is bad with --skip-bad-samples"):
        run(own_source, out)
    assert {path.name for path in out.iterdir()} <= {NAME, *(f"train-00000{n}.tar" for n in range(5))}
    number = next(n for n in range(5) if not (out / f"train-00000{n}.tar").exists())
    # The others do not go on behind an error.
    assert not (out / f"train-00000{number + 1}.tar").exists()
    conversion = convert(own_source, out, num_threads=1, shard_size=SHARD_SIZE, skip_bad=True, show_progress=False)
    (problem,) = conversion.left_out
    assert problem.startswith(f"{bad}: ")
    assert conversion.index.splits["train"].num_samples == 22
    keys = [name for path in out.glob("train-*.tar") for name, _ in members(path) if name.endswith(".cls")]
    assert sorted(keys) == [f"{place:08d}.cls" for place in range(23) if place != 4]
    # Mended, they are what they would have been.
    bad.write_bytes(good)
    run(own_source, tmp_path / "mended")
    assert ShardIndex.load(str(tmp_path / "mended")).splits["train"].num_samples == 23


def test_the_error_is_that_of_the_bad_sample(
    own_source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_first(futures: list[Future[object]]) -> list[Future[object]]:
        wait(futures)
        return futures[::-1]

    monkeypatch.setattr(module, "as_completed", last_first)
    bad = own_source.root / own_source.splits["test"][0][0]
    bad.write_bytes(b"")
    with pytest.raises(UserError, match=f"^{bad}: is empty"):
        run(replace(own_source, splits={"test": own_source.splits["test"]}), tmp_path / "out", shard_size=2)


def test_what_was_left_out_is_not_taken_for_complete(
    own_source: Source, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    bad = own_source.root / own_source.splits["train"][4][0]
    good = bad.read_bytes()
    bad.write_bytes(b"")
    interrupt(own_source, out, monkeypatch, skip_bad=True)
    with pytest.raises(UserError, match="is empty; mend it"):
        run(own_source, out)
    bad.write_bytes(good)
    run(own_source, out)
    assert snapshot(out) == whole


def test_shards_without_a_good_sample(own_source: Source, tmp_path: Path) -> None:
    for file, _ in own_source.splits["test"][:3]:
        (own_source.root / file).write_bytes(b"")
    options = {"num_threads": 1, "shard_size": SHARD_SIZE, "skip_bad": True, "show_progress": False}
    index = convert(own_source, tmp_path / "out", **options).index  # type: ignore[arg-type]
    assert [shard.name for shard in index.splits["test"].shards] == ["test-000001.tar"]
    assert not (tmp_path / "out/test-000000.tar").exists()
    for file, _ in own_source.splits["test"]:
        (own_source.root / file).write_bytes(b"")
    first = own_source.root / own_source.splits["test"][0][0]
    with pytest.raises(UserError, match=f"none of the 7 samples of split 'test' is good; the first: {first}: is empty"):
        convert(own_source, tmp_path / "none", **options)  # type: ignore[arg-type]


def test_what_readers_would_not_take_is_refused(
    own_source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = own_source.root / "odd.gif"
    odd.write_bytes(picture(3, "GIF"))
    with pytest.raises(UserError, match=r"odd\.gif: its name ends in 'gif'; in shards images end in jpg, "):
        run(replace(own_source, splits={"train": [("odd.gif", 0)]}), tmp_path / "odd")
    monkeypatch.setattr("spt_dist.data.shards.sources.MOST_SAMPLE_BYTES", 100)
    with pytest.raises(UserError, match=r"has [0-9]+ bytes; in shards a sample has at most 100"):
        run(own_source, tmp_path / "large")
    with pytest.raises(UserError, match="--shard-size 0: has to be at least 1"):
        run(own_source, tmp_path / "none", shard_size=0)
    with pytest.raises(UserError, match="--workers 0: has to be at least 1"):
        run(own_source, tmp_path / "none", num_threads=0)
    with pytest.raises(UserError, match="split 'val' has no samples"):
        run(replace(own_source, splits={"val": []}), tmp_path / "none")
