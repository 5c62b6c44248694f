"""Writing one shard: a tar file whose bytes depend on its samples alone."""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from struct import pack
from tarfile import BLOCKSIZE, RECORDSIZE, USTAR_FORMAT, TarInfo
from typing import Final

from spt_dist.data.shards.index import Shard
from spt_dist.data.shards.tar import checksum
from spt_dist.files import write_atomically

Members = Sequence[tuple[str, bytes]]
"""The files of one sample, in their order: name and content."""

_MODE: Final = 0o644


def write_shard(path: Path, samples: Iterable[Members]) -> Shard:
    """Write a shard atomically: plain ustar, no times, no owners.

    Args:
        path: where the shard shall appear.
        samples: each with a key of its own. Read one by one while the shard is written; what this raises is passed on.

    Returns:
        what an index says of it.

    Raises:
        OSError: as raised by the file system (a full disk, say); ``path`` is then what it was before.
    """
    digest, checksums = sha256(), bytearray()
    num_bytes = 0

    def write(temporary: Path) -> None:
        nonlocal num_bytes
        with temporary.open("wb") as file:
            for members in samples:
                for name, content in members:
                    for block in (_header(name, len(content)), content, bytes(-len(content) % BLOCKSIZE)):
                        num_bytes += file.write(block)
                        digest.update(block)
                checksums.extend(pack("<I", checksum(members)))
            end = bytes(2 * BLOCKSIZE)
            end += bytes(-(num_bytes + len(end)) % RECORDSIZE)
            num_bytes += file.write(end)
            digest.update(end)

    write_atomically(path, write)
    return Shard(path.name, num_bytes, len(checksums) // 4, digest.hexdigest(), bytes(checksums))


def _header(name: str, size: int) -> bytes:
    info = TarInfo(name)
    info.size, info.mode = size, _MODE
    return info.tobuf(USTAR_FORMAT)
