"""Reading samples from a tar file as it comes, trusting nothing in it.

Nothing is written to a disk, and no name in the file is taken for a path. A sample is what webdataset takes for one:
files that follow each other and have one name up to the first dot.
"""

import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from webdataset.tariterators import base_plus_ext

from spt_dist.data.shards.openers import Stream

IMAGES: Final = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")
LABEL, MASK = "cls", "seg.png"
MOST_SAMPLE_BYTES: Final = 2**26
_MOST_HEADER_BYTES: Final = 2**16
_MOST_HEADERS: Final = 8
_LARGEST_FILE: Final = 2**40
_BLOCK: Final = 512
_PIECE: Final = 2**20
# As tarfile has it: other types than these have contents.
_WITHOUT_CONTENT: Final = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_REGULAR: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX: Final = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_DIGITS = re.compile(r"[0-9]{1,20}")


@dataclass
class StoredSample:
    """A sample as it is in a shard.

    Attributes:
        key: what the names of its files have in common.
        files: content by extension, in lower case: of images, labels and masks. Others are not kept.
        checksum: as the function of this name; of all its files.
        problem: why it can't be used; "" for no reason known yet.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    checksum: int = 0
    problem: str = ""


@dataclass(frozen=True)
class _Member:
    """A regular file whose content comes next."""

    name: str
    key: str
    extension: str
    size: int


def checksum(files: Iterable[tuple[str, bytes]]) -> int:
    """What an index keeps of a sample: crc32 of the name, a zero byte and the content of each file, one after another.

    Args:
        files: names, as in the tar file, and contents.
    """
    value = 0
    for name, content in files:
        value = zlib.crc32(content, _checksum_name(name, value))
    return value


class SampleReader:
    """The samples of a tar file, from the first to the last.

    Args:
        stream: the file. It stays the caller's to close.

    Attributes:
        position: how many samples have been read or passed over.
        end: why there is no further sample; "" while there may be one.
        is_whole: whether ``end`` is that the file ends as a tar file does.
    """

    def __init__(self, stream: Stream) -> None:
        self.position = 0
        self.end = ""
        self.is_whole = False
        self._stream = stream
        self._offset = 0
        self._next: _Member | None = None

    def __iter__(self) -> Iterator[StoredSample]:
        while (sample := self.read()) is not None:
            yield sample

    def read(self) -> StoredSample | None:
        """The next sample; ``None`` where there is none any more, which ``end`` tells the reason of."""
        return self._sample(keep=True)

    def pass_over(self, count: int) -> bool:
        """Leave out samples. Returns whether there were so many."""
        return all(self._sample(keep=False) is not None for _ in range(count))

    def _sample(self, keep: bool) -> StoredSample | None:
        member = self._take_next()
        if member is None:
            return None
        sample = StoredSample(member.key)
        while member is not None and member.key == sample.key:
            if keep:
                self._take_content(sample, member)
            else:
                self._skip(_padded(member.size))
            if self.end:
                return None
            member = self._next = self._header()
        self.position += 1
        return sample

    def _take_next(self) -> _Member | None:
        if self._next is None and not self.end:
            self._next = self._header()
        member, self._next = self._next, None
        return member

    def _take_content(self, sample: StoredSample, member: _Member) -> None:
        kept = member.extension in (*IMAGES, LABEL, MASK)
        if member.size + kept * sum(map(len, sample.files.values())) > MOST_SAMPLE_BYTES:
            sample.problem = f"{member.name[:80]!r} has {member.size:,} bytes; a sample may have {MOST_SAMPLE_BYTES:,}"
            self._skip(_padded(member.size))
            return
        sample.checksum = _checksum_name(member.name, sample.checksum)
        missing, pieces = member.size, []
        while missing:
            piece = self._read(min(missing, _PIECE))
            if not piece:
                self._stop(f"it is cut off in the content of {member.name[:80]!r}")
                return
            sample.checksum = zlib.crc32(piece, sample.checksum)
            missing -= len(piece)
            if kept:
                pieces.append(piece)
        self._skip(_padded(member.size) - member.size)
        if kept and member.extension in sample.files:
            sample.problem = f"there are two files {member.name[:80]!r}"
        elif kept:
            sample.files[member.extension] = b"".join(pieces)

    def _header(self) -> _Member | None:
        """Go to the content of the next regular file that has a key."""
        path: str | None = None
        size: int | None = None
        num_headers, is_sparse = 0, False
        while (info := self._block()) is not None:
            if info.type in _PAX or info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                num_headers += 1
                content = self._extension(info, num_headers)
                if content is None:
                    return None
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    path = _text(content.partition(b"\0")[0])
                elif info.type in _PAX:
                    records = self._records(content)
                    if records is None:
                        return None
                    path, size = records.get("path", path), _number(records.get("size"), size)
                    is_sparse = is_sparse or any(name.startswith("GNU.sparse.") for name in records)
                continue
            member = self._member(info, path, info.size if size is None else size, is_sparse)
            if member is not None or self.end:
                return member
            path = size = None
            num_headers, is_sparse = 0, False
        return None

    def _member(self, info: tarfile.TarInfo, path: str | None, size: int, is_sparse: bool) -> _Member | None:
        """What a header stands for; ``None`` if it is not for us, with what belongs to it passed over."""
        if info.type == tarfile.GNUTYPE_SPARSE or not 0 <= size <= _LARGEST_FILE:
            what = "a sparse file" if info.type == tarfile.GNUTYPE_SPARSE else f"a file of {size:,} bytes"
            self._stop(f"there is {what} in it ({(path or info.name)[:80]!r})")
            return None
        name = info.name if path is None else path
        key, extension = base_plus_ext(name)
        if info.type in _REGULAR and not is_sparse and key is not None:
            return _Member(name, key, extension.lower(), size)
        if info.type not in _WITHOUT_CONTENT:
            self._skip(_padded(size))
        return None

    def _block(self) -> tarfile.TarInfo | None:
        """The next header; ``None`` if there is none, with the reason in ``end``."""
        start = self._offset
        block = self._read(_BLOCK)
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            pass
        if len(block) < _BLOCK:
            self._stop("it is empty" if not self._offset else f"it is cut off at byte {self._offset:,}")
        elif not block.strip(b"\0"):
            self._stop(f"the mark of its end stands at byte {start:,}")
            self.is_whole = bool(start)
        elif not start:
            self._stop(f"it is no tar file; it begins with {block[:16]!r}")
        else:
            self._stop(f"the header at byte {start:,} is damaged")
        return None

    def _extension(self, info: tarfile.TarInfo, num_headers: int) -> bytes | None:
        """The content of a header that extends the next one."""
        if not 0 <= info.size <= _MOST_HEADER_BYTES or num_headers > _MOST_HEADERS:
            self._stop(f"there is header number {num_headers} of a file in it, of {info.size:,} bytes")
            return None
        content = self._read(_padded(info.size))
        if len(content) < info.size:
            self._stop(f"it is cut off at byte {self._offset:,}")
            return None
        return content[: info.size]

    def _records(self, content: bytes) -> dict[str, str] | None:
        """What a pax header says: records "LENGTH NAME=VALUE\\n"."""
        records = {}
        while content.strip(b"\0"):
            length = content.partition(b" ")[0]
            end = int(length) if re.fullmatch(rb"[1-9][0-9]{0,5}", length) else 0
            if not len(length) < end <= len(content) or content[end - 1 : end] != b"\n":
                self._stop(f"the header before byte {self._offset:,} is damaged")
                return None
            name, _, value = content[len(length) + 1 : end - 1].partition(b"=")
            records[_text(name)] = _text(value)
            content = content[end:]
        return records

    def _read(self, count: int) -> bytes:
        try:
            content = self._stream.read(count)
        except OSError as error:
            self._stop(str(error.strerror or error))
            return b""
        self._offset += len(content)
        return content

    def _skip(self, count: int) -> None:
        try:
            self._stream.skip(count)
        except OSError as error:
            self._stop(str(error.strerror or error))
        self._offset += count

    def _stop(self, why: str) -> None:
        # What is found first is the cause of what is found later.
        self.end = self.end or why


def _checksum_name(name: str, value: int) -> int:
    return zlib.crc32(name.encode("utf-8", "surrogateescape") + b"\0", value)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _number(text: str | None, otherwise: int | None) -> int | None:
    """A pax size; what is no number is refused as -1."""
    if text is None:
        return otherwise
    return int(text) if _DIGITS.fullmatch(text) else -1
