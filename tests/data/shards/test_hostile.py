"""Tar files made to do harm."""

import io
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_dist.data.shards import tar
from spt_dist.data.shards.openers import open_stream
from spt_dist.data.shards.tar import SampleReader, StoredSample, checksum
from tests.data.shards.shards_for_tests import Files, crc, open_set, read, sample_files, tar_of, write_shard

GOOD = [sample_files(index) for index in range(4)]


class Bytes(io.BytesIO):
    """A file in memory as a stream."""

    def skip(self, count: int) -> None:
        self.seek(count, io.SEEK_CUR)

    def failure(self) -> str:
        return ""


def samples_of(content: bytes) -> tuple[list[StoredSample], SampleReader]:
    reader = SampleReader(Bytes(content))  # type: ignore[arg-type]  # it is no subclass, but does the same
    return list(reader), reader


def member(name: str, **attributes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("prefix", ["../../", "/", "/etc/", "a/../../../", "a\\", "./", "~/", "C:/"])
def test_names_are_only_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    inner = tmp_path / "a" / "b" / "c"
    samples = [[(prefix + name, content) for name, content in sample_files(index)] for index in range(3)]
    write_shard(inner, samples)
    monkeypatch.chdir(inner)
    before = files_below(tmp_path)
    assert read(open_set(inner), 1, [0, 1, 2]) == [0, 1, 2]
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_only_regular_files_are_taken(tmp_path: Path, kind: bytes) -> None:
    link = member("000001.jpg", type=kind, linkname="/etc/passwd", devmajor=1, devminor=5)
    members: list[tuple[Any, bytes]] = [*GOOD[0], (link, b""), (GOOD[1][1][0], GOOD[1][1][1]), *GOOD[2]]
    content = tar_of(members)
    stored, reader = samples_of(content)
    assert [sorted(sample.files) for sample in stored] == [["cls", "jpg"], ["cls"], ["cls", "jpg"]]
    assert reader.is_whole
    # An index may have been made of it: the sample then lacks its image.
    folder = write_shard(tmp_path, [GOOD[0], GOOD[1][1:], GOOD[2]], content)
    found = read(open_set(folder), None, [0, 1, 2])
    assert found[::2] == [0, 2] and "(key '000001'): it has 0 images, not one" in str(found[1])


def test_links_have_no_content_whatever_size_they_say() -> None:
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
        content = tar_of([*GOOD[0], (member("x", type=kind), b""), *GOOD[1]])
        # Behind two files of a block each.
        content = with_size(content, 2048, b"00000000700\0")
        stored, reader = samples_of(content)
        assert [sample.key for sample in stored] == ["000000", "000001"] and reader.is_whole
        with tarfile.open(fileobj=io.BytesIO(content)) as opened:
            assert len(opened.getnames()) == 5, "tarfile has it so"


def sparse_by_pax() -> bytes:
    info = member("000001.jpg", size=1024, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": "99999999999"})
    return tar_of([*GOOD[0], (info, bytes(1024)), *GOOD[2]], tarfile.PAX_FORMAT)


def old_sparse() -> bytes:
    info = member("000001.jpg", type=tarfile.GNUTYPE_SPARSE, size=512)
    return tar_of([*GOOD[0], (info, bytes(512)), *GOOD[2]], tarfile.GNU_FORMAT)


def test_sparse_files_are_not_blown_up() -> None:
    stored, reader = samples_of(sparse_by_pax())
    assert [sample.key for sample in stored] == ["000000", "000002"] and reader.is_whole
    stored, reader = samples_of(old_sparse())
    assert [sample.key for sample in stored] == ["000000"]
    assert reader.end == "there is a sparse file in it ('000001.jpg')" and not reader.is_whole


def with_size(content: bytes, place: int, size: bytes) -> bytes:
    """A tar file whose header at ``place`` has another size, and the right checksum."""
    header = bytearray(content[place : place + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:place] + bytes(header) + content[place + 512 :]


@pytest.mark.parametrize("size", [2**26 + 1, 2**33 - 1, 2**40, 2**63, 2**80, -1, -512])
def test_sizes_are_believed_only_so_far(tmp_path: Path, size: int) -> None:
    coded = b"%011o\0" % size
    if not 0 <= size < 8**11:
        coded = bytes([0x80 if size >= 0 else 0xFF]) + (size % 256**11).to_bytes(11, "big")
    content = with_size(tar_of(file for files in GOOD for file in files), 0, coded)
    tracemalloc.start()
    found = read(open_set(write_shard(tmp_path, GOOD, content)), None, [0, 1, 2, 3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(isinstance(each, str) for each in found)
    assert peak < 5_000_000
    told = str(found[0])
    assert f"a file of {size:,} bytes" in told or "cut off" in told or "a sample may have" in told, told


def test_a_size_that_is_met_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MOST_SAMPLE_BYTES", 1000)
    large = [("000001.jpg", b"1 " + bytes(999)), ("000001.cls", b"1")]
    both = [("000002.jpg", b"2 " + bytes(600)), ("000002.seg.png", bytes(600)), ("000002.cls", b"2")]
    folder = write_shard(tmp_path, [GOOD[0], large, both, sample_files(4)])
    found = read(open_set(folder), None, [0, 1, 2, 3])
    assert [found[0], found[3]] == [0, 4]
    assert "sample 1 of 4 (key '000001'): '000001.jpg' has 1,001 bytes; a sample may have 1,000" in str(found[1])
    assert "'000002.seg.png' has 600 bytes" in str(found[2])


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_of_headers_are_bounded(kind: bytes) -> None:
    bomb = member("x", type=kind, size=2**17)
    stored, reader = samples_of(tar_of([*GOOD[0], (bomb, bytes(2**17)), *GOOD[1]]))
    assert [sample.key for sample in stored] == ["000000"]
    assert reader.end == "there is header number 1 of a file in it, of 131,072 bytes"
    # tarfile itself calls itself anew for each, and ends with a RecursionError.
    chain = tar_of([*GOOD[0], *[(member("x", type=kind, size=0), b"")] * 5000, *GOOD[1]])
    stored, reader = samples_of(chain)
    assert [sample.key for sample in stored] == ["000000"]
    assert reader.end == "there is header number 9 of a file in it, of 0 bytes"


@pytest.mark.parametrize(
    "records", [b"99 path=x\n", b"0 path=x\n", b"path=x\n", b"-5 path=x\n", b"9" * 5000 + b" path=x\n", b"3 a"]
)
def test_broken_pax_records(records: bytes) -> None:
    bad = member("x", type=tarfile.XHDTYPE, size=len(records))
    stored, reader = samples_of(tar_of([*GOOD[0], (bad, records), *GOOD[1]]))
    assert [sample.key for sample in stored] == ["000000"] and "is damaged" in reader.end


@pytest.mark.parametrize("size", ["-1", "x", "1_0", "\u0661", "9" * 30, str(2**41)])
def test_pax_sizes(size: str) -> None:
    record = b"size=" + size.encode() + b"\n"
    length = len(record) + 3
    record = b"%d " % length + record
    assert len(record) == length or length < 10
    if len(record) != length:
        record = b"%d " % len(record) + record.partition(b" ")[2]
    header = member("x", type=tarfile.XHDTYPE, size=len(record))
    stored, reader = samples_of(tar_of([*GOOD[0], (header, record), *GOOD[1]]))
    assert [sample.key for sample in stored] == ["000000"] and reader.end.startswith("there is a file of")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read(format: int) -> None:
    folder = "a" * 60 + "/" + "b" * 60
    long = "" if format == tarfile.USTAR_FORMAT else "é" * 150
    samples: list[Files] = [
        [(f"{folder}/{long}{index}.jpg", b"x" * index), (f"{folder}/{long}{index}.cls", b"1")] for index in range(5)
    ]
    content = tar_of(
        [(member("dir", type=tarfile.DIRTYPE), b""), *(file for files in samples for file in files)], format
    )
    stored, reader = samples_of(content)
    assert reader.is_whole
    assert [sample.key for sample in stored] == [f"{folder}/{long}{index}" for index in range(5)]
    assert [sample.files["jpg"] for sample in stored] == [b"x" * index for index in range(5)]
    assert [sample.checksum for sample in stored] == [crc(files) for files in samples] == [*map(checksum, samples)]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._path, "w")


def test_nothing_but_images_labels_and_masks_is_decoded(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    pickled = pickle.dumps(Trap(trap))
    pickle.loads(pickled).close()
    assert trap.exists(), "the trap works"
    trap.unlink()
    names = ["pyd", "pickle", "pkl", "pt", "pth", "npy", "json", "py", "jpg.pickle", "cls.pyd"]
    files = [*sample_files(3), *((f"000003.{name}", pickled) for name in names)]
    folder = write_shard(tmp_path / "shards", [sample_files(2), files, sample_files(4)])
    assert read(open_set(folder), 0, [0, 1, 2]) == [2, 3, 4]
    assert not trap.exists()
    stored = samples_of((folder / "train-000000.tar").read_bytes())[0]
    assert [sorted(sample.files) for sample in stored] == [["cls", "jpg"]] * 3
    # They are under the checksum all the same.
    damaged = (folder / "train-000000.tar").read_bytes().replace(pickled, pickled[:-2] + b"xx", 1)
    (folder / "train-000000.tar").write_bytes(damaged)
    assert "not what the index has" in str(read(open_set(folder), 0, [1])[0])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"7", "its class is 7, but the classes are 0 to 6"),
        (b"99999999999999999999", "has to be an integer"),
        (b"-1", "its .cls is b'-1'; it has to be an integer"),
        (b"1.0", "has to be an integer"),
        (b"1_0", "has to be an integer"),
        (b"+1", "has to be an integer"),
        ("٣".encode(), "has to be an integer"),
        (b"", "its .cls is b''; it has to be an integer"),
        (b"1 2", "has to be an integer"),
        (b"cat" * 10**6, "its .cls is b'catcatcatcatcatcatca'; it"),
    ],
)
def test_labels(tmp_path: Path, label: bytes, message: str) -> None:
    bad = [("000001.jpg", b"1 "), ("000001.cls", label)]
    found = read(open_set(write_shard(tmp_path, [GOOD[0], bad, GOOD[2]])), None, [0, 1, 2])
    assert found[::2] == [0, 2]
    assert str(found[1]).startswith(f"{tmp_path}/train-000000.tar: sample 1 of 3 (key '000001'): ")
    assert message in str(found[1]) and len(str(found[1])) < 400


def test_label_with_a_line_end_is_fine(tmp_path: Path) -> None:
    files = [("a.PNG", b"5 "), ("a.CLS", b"06\n")]
    samples = open_set(write_shard(tmp_path, [files]))
    (item,) = samples.stream(None, [0])
    assert int(item[0][0]) == 5 and item[1] == 6


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("1.jpg", b"1 "), ("1.jpg", b"2 "), ("1.cls", b"1")], "there are two files '1.jpg'"),
        ([("1.jpg", b"1 "), ("1.png", b"2 "), ("1.cls", b"1")], "it has 2 images, not one"),
        ([("1.jpg", b"1 ")], "it has no file .cls"),
        ([("1.cls", b"1"), ("1.json", b"{}")], "it has 0 images, not one"),
        ([("1.jpg", b"x"), ("1.cls", b"1")], "no number"),
        ([("\x1b[31m\n.jpg", b"x"), ("\x1b[31m\n.cls", b"1")], r"'\x1b[31m\n'"),
    ],
)
def test_what_a_sample_has_to_have(tmp_path: Path, files: Files, message: str) -> None:
    found = read(open_set(write_shard(tmp_path, [GOOD[0], files, GOOD[2]])), None, [0, 1, 2])
    assert found[::2] == [0, 2] and message in str(found[1]) and "\x1b" not in str(found[1])


def test_a_key_may_come_again_later(tmp_path: Path) -> None:
    again = [(name, b"9 ") if name.endswith("jpg") else (name, content) for name, content in GOOD[0]]
    assert read(open_set(write_shard(tmp_path, [GOOD[0], GOOD[1], again])), None, [2, 0]) == [9, 0]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000) | st.lists(st.sampled_from([b"\0" * 512, b"x" * 512]), max_size=5).map(b"".join))
def test_any_bytes_come_to_an_end(content: bytes) -> None:
    samples, reader = samples_of(content)
    assert samples == [] and reader.end and not reader.is_whole


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_damage_is_survived(data: st.DataObject) -> None:
    content = bytearray(tar_of([file for files in GOOD for file in files], tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    start = 512 * data.draw(st.integers(0, 6))
    # A header with a valid checksum, whatever else it says.
    damaged = with_size(bytes(content), start, data.draw(st.binary(min_size=12, max_size=12)))
    stored, reader = samples_of(damaged)
    assert reader.end
    assert sum(len(file) for sample in stored for file in sample.files.values()) <= len(content)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=512, max_size=512), st.sampled_from([b"0", b"x", b"g", b"L", b"K", b"S", b"1", b"Z", b"\0"]))
def test_any_header_is_survived(header: bytes, kind: bytes) -> None:
    block = header[:156] + kind + header[157:]
    stored, reader = samples_of(with_size(block + bytes(2048), 0, b"00000000100\0") + tar_of(GOOD[0]))
    assert reader.end and len(stored) <= 3


def test_the_reader_holds_no_list_of_what_it_has_passed(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(file for index in range(3000) for file in sample_files(index)))
    stream = open_stream(str(tmp_path), "x.tar")
    reader = SampleReader(stream)
    reader.pass_over(10)
    tracemalloc.start()
    assert reader.pass_over(2980)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    stream.close()
    assert peak < 200_000 and reader.position == 2990
