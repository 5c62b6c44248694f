"""What a conversion has done so far, so that one that was interrupted goes on."""

import fcntl
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from spt_dist.data.shards.index import Shard
from spt_dist.errors import UserError

NAME: Final = "conversion.jsonl"
_FORMAT: Final = {"format": "spt_dist.conversion", "version": 1}


@dataclass(frozen=True)
class Written:
    """A shard that is complete.

    Attributes:
        shard: what an index says of it; without samples where all were bad.
        left_out: what is wrong with each sample that is not in it.
    """

    shard: Shard
    left_out: tuple[str, ...]


class Journal:
    """A file beside the shards: a line on what is converted, and one for each shard that is complete.

    Locked while it is open. A line that was cut off is dropped when the file is opened again.

    Attributes:
        written: name -> each shard that the file speaks of.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        """Begin a conversion into a new or empty folder, or go on with one.

        Args:
            folder: where the shards go.
            request: all that decides their bytes; compared with that of the interrupted conversion.

        Raises:
            UserError: the folder has other things in it, or a conversion of something else, or one that is running.
        """
        self.path = folder / NAME
        if folder.exists() and not self.path.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is there already; shards go into a new or an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        # Without a buffer, which would be written once more when a full disk is left.
        self._file = self.path.open("a+b", buffering=0)
        try:
            self._lock(folder)
            self.written: dict[str, Written] = {}
            self._read(folder, request)
        except BaseException:
            self._file.close()
            raise

    def add(self, written: Written) -> None:
        """Note a shard that is complete, and on the disk.

        Raises:
            OSError: as raised by the file system.
        """
        self._append(
            {
                "name": written.shard.name,
                "num_bytes": written.shard.num_bytes,
                "num_samples": written.shard.num_samples,
                "sha256": written.shard.sha256,
                "checksums": b64encode(written.shard.checksums).decode(),
                "left_out": list(written.left_out),
            }
        )
        self.written[written.shard.name] = written

    def remove(self) -> None:
        """The conversion is complete."""
        self.path.unlink()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _lock(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another conversion is writing there; wait for it or end it") from error
        except OSError:
            # Some network file systems have no locks; there nobody is warned.
            pass

    def _read(self, folder: Path, request: Mapping[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        # Behind the last newline is nothing, or a line that was cut off.
        cut_off = lines.pop()
        if cut_off:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._append(_FORMAT | dict(request))
            return
        try:
            first, *others = map(json.loads, lines)
            self.written = {fields["name"]: _parse(fields) for fields in others}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: is damaged ({error}); remove {folder} and convert again") from error
        wanted = _FORMAT | dict(request)
        changed = [key for key in wanted if first.get(key) != wanted[key]]
        if changed:
            what = "; ".join(f"{key}: {_short(first.get(key))} there, {_short(wanted[key])} now" for key in changed)
            raise UserError(
                f"{folder}: has the shards of an unfinished conversion of something else ({what}); "
                f"give it what it was begun with, or another folder"
            )

    def _append(self, fields: Mapping[str, Any]) -> None:
        left = memoryview(json.dumps(fields).encode() + b"\n")
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())


def _parse(fields: Mapping[str, Any]) -> Written:
    shard = Shard(
        name=fields["name"],
        num_bytes=fields["num_bytes"],
        num_samples=fields["num_samples"],
        sha256=fields["sha256"],
        checksums=b64decode(fields["checksums"], validate=True),
    )
    return Written(shard, tuple(fields["left_out"]))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
