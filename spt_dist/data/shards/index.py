"""What shards there are and what is in them: ``index.json``, which lies beside them."""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from spt_dist.data.shards.openers import read_whole, shown
from spt_dist.data.task import CLASSIFICATION, SEGMENTATION
from spt_dist.errors import UserError

INDEX_NAME: Final = "index.json"
FORMAT: Final = "spt_dist.shards"
VERSION: Final = 1
_MOST_INDEX_BYTES: Final = 2**30
# Names become parts of paths, of URLs and of commands, where a leading dash would be an option.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHECKSUM_BYTES: Final = 4


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        name: of the file, without a folder.
        num_bytes: its size.
        num_samples: how many samples are in it.
        sha256: of the file, in hexadecimal digits.
        checksums: ``tar.checksum`` of each sample: uint32, the lowest byte first.
    """

    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    checksums: bytes

    def checksum(self, position: int) -> int:
        """Of the sample at a position, counted from 0."""
        start = position * _CHECKSUM_BYTES
        return int.from_bytes(self.checksums[start : start + _CHECKSUM_BYTES], "little")


@dataclass(frozen=True)
class Split:
    """The shards of one split. Sample ``i`` is the ``i``-th of its shards laid end to end."""

    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        """Of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    def digest(self) -> str:
        """Of which samples there are, in which shards."""
        listed = [f"{shard.name} {shard.num_samples} {shard.sha256}" for shard in self.shards]
        return sha256("\n".join(listed).encode()).hexdigest()


@dataclass(frozen=True)
class ShardIndex:
    """What ``index.json`` says.

    Attributes:
        kind: of the task: "classification" or "segmentation".
        classes: the name of each class.
        splits: by name.
    """

    kind: str
    classes: tuple[str, ...]
    splits: dict[str, Split]

    @classmethod
    def load(cls, location: str) -> "ShardIndex":
        """Read the index of a folder or of what stands for one.

        Args:
            location: as for ``openers.open_stream``.

        Raises:
            UserError: it can't be read, or is not what it should be; names the file and the field.
        """
        return cls.parse(read_whole(location, INDEX_NAME, _MOST_INDEX_BYTES), shown(location, INDEX_NAME))

    @classmethod
    def parse(cls, content: bytes, path: str) -> "ShardIndex":
        """Read the content of an index.

        Args:
            content: JSON.
            path: where it is from, for errors.

        Raises:
            UserError: as ``load``.
        """
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}); it begins with {content[:40]!r}") from error
        top = _Fields(path, "", fields)
        if top.take("format", str) != FORMAT or top.take("version", int) != VERSION:
            written = f"format={fields['format']!r}, version={fields['version']!r}"
            raise UserError(f"{path}: {written}; this version reads format={FORMAT!r}, version={VERSION}")
        kind = top.take("kind", str)
        if kind not in (CLASSIFICATION, SEGMENTATION):
            raise UserError(f"{path}: kind={kind!r} has to be {CLASSIFICATION!r} or {SEGMENTATION!r}")
        classes = top.take("classes", list)
        if not classes or not all(isinstance(name, str) for name in classes):
            raise UserError(f"{path}: classes has to be a list of one name or more")
        splits = top.take("splits", dict)
        return cls(kind, tuple(classes), {name: _split(path, name, split) for name, split in splits.items()})

    def to_json(self) -> str:
        """The content of ``index.json``."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "classes": list(self.classes),
            "splits": {
                name: {"num_samples": split.num_samples, "shards": [_shard_fields(shard) for shard in split.shards]}
                for name, split in self.splits.items()
            },
        }
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"

    def split(self, name: str, location: str) -> Split:
        """One of the splits.

        Args:
            name: of the split.
            location: where the index is from, for the error.

        Raises:
            UserError: there is none of this name, or it is empty.
        """
        if name not in self.splits or not self.splits[name].num_samples:
            there = ", ".join(name for name, split in self.splits.items() if split.num_samples) or "none"
            raise UserError(f"{shown(location, INDEX_NAME)}: has no samples of a split {name!r}; it has {there}")
        return self.splits[name]


class _Fields:
    """The fields of a JSON object, with errors that name them."""

    def __init__(self, path: str, place: str, fields: Any) -> None:
        self._path, self._place, self._fields = path, place, fields
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {place or 'the whole'} has to be an object, not {type(fields).__name__}")

    def take(self, name: str, kind: type) -> Any:
        if name not in self._fields:
            raise UserError(f"{self._path}: {self._place}{name} is missing")
        value = self._fields[name]
        # A bool is an int to isinstance.
        if type(value) is not kind:
            raise self.error(name, f"has to be of type {kind.__name__}")
        return value

    def count(self, name: str) -> int:
        value: int = self.take(name, int)
        if value < 0:
            raise self.error(name, "has to be 0 or more")
        return value

    def error(self, name: str, wanted: str) -> UserError:
        return UserError(f"{self._path}: {self._place}{name}={str(self._fields[name])[:80]!r} {wanted}")


def _split(path: str, name: str, value: Any) -> Split:
    fields = _Fields(path, f"splits.{name}.", value)
    listed = fields.take("shards", list)
    shards = tuple(_shard(path, f"splits.{name}.shards[{place}].", shard) for place, shard in enumerate(listed))
    split = Split(shards)
    if len({shard.name for shard in shards}) < len(shards):
        raise UserError(f"{path}: splits.{name}.shards names a shard twice")
    if fields.count("num_samples") != split.num_samples:
        raise fields.error("num_samples", f"is not {split.num_samples:,}, the sum over its shards")
    return split


def _shard(path: str, place: str, value: Any) -> Shard:
    fields = _Fields(path, place, value)
    name, sha256 = fields.take("name", str), fields.take("sha256", str)
    if not _NAME.fullmatch(name):
        raise fields.error("name", "has to be a file name of letters, digits, '.', '_' and '-'")
    if not _SHA256.fullmatch(sha256):
        raise fields.error("sha256", "has to be 64 hexadecimal digits")
    num_samples = fields.count("num_samples")
    try:
        checksums = base64.b64decode(fields.take("checksums", str), validate=True)
    except (binascii.Error, ValueError) as error:
        raise fields.error("checksums", f"is not base64 ({error})") from error
    if len(checksums) != num_samples * _CHECKSUM_BYTES:
        raise fields.error("checksums", f"has {len(checksums):,} bytes, not {_CHECKSUM_BYTES} a sample")
    return Shard(name, fields.count("num_bytes"), num_samples, sha256, checksums)


def _shard_fields(shard: Shard) -> dict[str, Any]:
    return {
        "name": shard.name,
        "num_bytes": shard.num_bytes,
        "num_samples": shard.num_samples,
        "sha256": shard.sha256,
        "checksums": base64.b64encode(shard.checksums).decode(),
    }
