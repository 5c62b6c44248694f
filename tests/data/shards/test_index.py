"""The index of shards."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from spt_dist import UserError
from spt_dist.data.shards.index import ShardIndex
from tests.data.shards.shards_for_tests import crc, index_fields, sample_files, shard_fields, tar_of, write_shards


def fields() -> dict[str, Any]:
    content = tar_of(sample_files(0) + sample_files(1))
    shard = shard_fields("train-000000.tar", content, [crc(sample_files(0)), crc(sample_files(1))])
    return index_fields({"train": [shard], "val": []})


def test_an_index_is_read_as_it_was_written(tmp_path: Path) -> None:
    index = ShardIndex.load(str(write_shards(tmp_path, [3, 0, 2])))
    assert (index.kind, len(index.classes), index.splits.keys()) == ("classification", 7, {"train"})
    shards = index.splits["train"].shards
    assert [shard.num_samples for shard in shards] == [3, 0, 2] and index.splits["train"].num_samples == 5
    assert [shard.checksum(1) for shard in shards[::2]] == [crc(sample_files(1)), crc(sample_files(4))]
    written = ShardIndex.parse(index.to_json().encode(), "somewhere")
    assert written == index
    assert json.loads(index.to_json()) == json.loads((tmp_path / "index.json").read_text())


def changed(path: str, value: Any) -> bytes:
    """An index with another value in one place; without it, where the value is ``...``."""
    whole = fields()
    *above, last = path.split(".")
    place: Any = whole
    for name in above:
        place = place[int(name) if isinstance(place, list) else name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(whole).encode()


SHARD = "splits.train.shards.0"
BAD: list[tuple[str, Any, str]] = [
    ("format", "other", "x/index.json: format='other', version=1; this version reads format='spt_dist.shards'"),
    ("version", 2, "version=2"),
    ("version", True, "x/index.json: version='True' has to be of type int"),
    ("kind", "detection", "kind='detection' has to be 'classification' or 'segmentation'"),
    ("kind", ..., "x/index.json: kind is missing"),
    ("classes", [], "classes has to be a list of one name or more"),
    ("classes", [1], "classes has to be a list"),
    ("splits", [], "splits='[]' has to be of type dict"),
    ("splits.train", 3, "splits.train. has to be an object, not int"),
    ("splits.train.num_samples", 3, "splits.train.num_samples='3' is not 2, the sum over its shards"),
    ("splits.train.shards", {}, "splits.train.shards='{}' has to be of type list"),
    (f"{SHARD}.name", "../x.tar", "splits.train.shards[0].name='../x.tar' has to be a file name of letters"),
    (f"{SHARD}.name", "-rf", "name='-rf' has to be"),
    (f"{SHARD}.name", "..", "name='..' has to be"),
    (f"{SHARD}.name", "a;b", "name='a;b' has to be"),
    (f"{SHARD}.name", "a\n", "has to be a file name"),
    (f"{SHARD}.name", ..., "splits.train.shards[0].name is missing"),
    (f"{SHARD}.num_bytes", -1, "splits.train.shards[0].num_bytes='-1' has to be 0 or more"),
    (f"{SHARD}.num_samples", 3, "splits.train.shards[0].checksums"),
    (f"{SHARD}.num_samples", 2.0, "num_samples='2.0' has to be of type int"),
    (f"{SHARD}.sha256", "ab", "sha256='ab' has to be 64 hexadecimal digits"),
    (f"{SHARD}.checksums", "!", "checksums='!' is not base64"),
    (f"{SHARD}.checksums", base64.b64encode(b"1234567").decode(), "has 7 bytes, not 4 a sample"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD)
def test_a_field_that_is_wrong_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        ShardIndex.parse(changed(path, value), "x/index.json")
    assert str(caught.value).startswith("x/index.json: ") and "\n" not in str(caught.value)


def test_a_shard_that_is_named_twice_is_refused() -> None:
    whole = fields()
    split = whole["splits"]["train"]
    split["shards"], split["num_samples"] = split["shards"] * 2, 4
    with pytest.raises(UserError, match=r"splits.train.shards names a shard twice"):
        ShardIndex.parse(json.dumps(whole).encode(), "x")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null"])
def test_what_is_no_index_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"x/index.json: (not JSON|the whole has to be an object)"):
        ShardIndex.parse(content, "x/index.json")


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    index = ShardIndex.parse(json.dumps(fields()).encode(), "x")
    assert index.split("train", "x").num_samples == 2
    for name in ("val", "test"):
        with pytest.raises(UserError, match=rf"/data/index.json: has no samples of a split '{name}'; it has train"):
            index.split(name, "/data")
