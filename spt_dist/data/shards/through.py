"""A shard read from its first byte to its last, for those who want to know all about it."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image

from spt_dist.data.pictures import decode
from spt_dist.data.samples import BadSampleError
from spt_dist.data.shards.index import Shard
from spt_dist.data.shards.openers import Stream, open_stream, shown
from spt_dist.data.shards.shard_set import raw_sample
from spt_dist.data.shards.tar import SampleReader, StoredSample

_PIECE: Final = 2**20
# One byte a pixel: grey, or numbers of a palette's colours, which is how some tools save labels.
_MASK_MODES: Final = ("L", "P")

Visit = Callable[[int, str, StoredSample], None]
"""Takes the position, the name for errors and the content of a sample; raises a ``BadSampleError``."""


@dataclass(frozen=True)
class Found:
    """What is in a tar file.

    Attributes:
        shard: what an index would say of it.
        problems: what is wrong, a line each; all of them name the file.
    """

    shard: Shard
    problems: tuple[str, ...]


class _Counted(Stream):
    """A stream of which nothing is passed over: all of it goes into a digest."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.digest, self.num_bytes = sha256(), 0

    def read(self, count: int) -> bytes:
        content = self._stream.read(count)
        self.digest.update(content)
        self.num_bytes += len(content)
        return content

    def skip(self, count: int) -> None:
        while count and (piece := self.read(min(count, _PIECE))):
            count -= len(piece)

    def failure(self) -> str:
        return self._stream.failure()

    def close(self) -> None:
        self._stream.close()


def read_through(location: str, name: str, visit: Visit) -> Found:
    """Read a tar file to its end, damaged or not.

    Args:
        location, name: as for ``openers.open_stream``.
        visit: called with each sample.
    """
    path = shown(location, name)
    checksums, problems = bytearray(), []
    try:
        stream = _Counted(open_stream(location, name))
    except OSError as error:
        return Found(Shard(name, 0, 0, "", b""), (f"{path}: can't be read ({error.strerror or error})",))
    try:
        reader = SampleReader(stream)
        for position, stored in enumerate(reader):
            checksums += struct.pack("<I", stored.checksum)
            try:
                visit(position, f"{path}: sample {position + 1:,} (key {stored.key})", stored)
            except BadSampleError as error:
                problems.append(str(error))
        if not reader.is_whole:
            # First, for a sample that is cut off is lacking as well.
            problems.insert(0, f"{path}: {reader.end}; {reader.position:,} samples are before that")
        while stream.read(_PIECE):
            pass
        failure = stream.failure()
    except OSError as error:
        failure = str(error.strerror or error)
    finally:
        stream.close()
    if failure:
        problems.append(f"{path}: {failure}")
    shard = Shard(name, stream.num_bytes, len(checksums) // 4, stream.digest.hexdigest(), bytes(checksums))
    return Found(shard, tuple(problems))


def examine(stored: StoredSample, name: str, kind: str, num_classes: int) -> None:
    """Look at all of a sample: decode its image, and its mask.

    Args:
        stored, name, kind, num_classes: as for ``raw_sample``.

    Raises:
        BadSampleError: a file is missing or can't be decoded; the label or the mask is none.
    """
    sample = raw_sample(stored, name, kind, num_classes)
    image = decode(sample.image, name)
    if isinstance(sample.target, bytes):
        _require_mask(sample.target, f"{name}: its mask", num_classes, image.size)


def _require_mask(content: bytes, name: str, num_classes: int, size: tuple[int, int]) -> None:
    # Decodes it with all checks; but the values are those before the conversion to RGB.
    decode(content, name)
    mask = Image.open(BytesIO(content))
    if mask.mode not in _MASK_MODES:
        raise BadSampleError(f"{name} has mode {mask.mode!r}; a mask has one channel of 8 bits (mode 'L')")
    if mask.size != size:
        (width, height), (image_width, image_height) = mask.size, size
        raise BadSampleError(f"{name} has {width} x {height} pixels, but its image {image_width} x {image_height}")
    highest = np.asarray(mask).max()
    if highest > num_classes:
        raise BadSampleError(f"{name} has the value {highest}; a mask's values are 0 to {num_classes}")
