"""Files where each host may have a file system of its own: who sees whose, and bringing them to who does not."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

from spt_dist.ranks import from_all_ranks

CHUNK_BYTES = 16 * 2**20


def who_sees(directory: Path) -> list[bool]:
    """Of each rank, whether it sees what rank 0 writes to a folder, which rank 0 makes. Collective.

    Raises:
        OSError: rank 0 can't write there.
    """
    if len(from_all_ranks(None)) == 1:
        return [True]
    probe = None
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        # A name that nobody has asked for: what is not there may be remembered by the client of a network file system.
        probe = directory / f".seen-{uuid4().hex}"
        probe.touch()
    name = from_all_ranks(probe and probe.name)[0]
    assert name is not None
    seen = from_all_ranks((directory / name).exists())
    if probe is not None:
        probe.unlink()
    return seen


@contextmanager
def rank_zeros_file(path: Path) -> Iterator[Path]:
    """Where this rank can read a file of rank 0's: at its place, or in a copy, on hosts that don't see it. Collective.

    The copy has the same name; who has opened it in the block can go on reading after it. One rank of a host writes it,
    in the folder for temporary files, and takes it away when all ranks have come to the end of the block. Where rank 0
    has no such file, nothing is brought.
    """
    said = from_all_ranks(_identity(path))
    if said[0] is None or all(one == said[0] for one in said):
        yield path
        return
    folder, writes = _folder_of_host(said[dist.get_rank()] != said[0])
    copy = folder and folder / path.name
    try:
        _send(path, copy if writes else None)
        yield copy or path
        # Everybody has opened it.
        from_all_ranks(None)
    finally:
        if folder and writes:
            shutil.rmtree(folder, ignore_errors=True)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from others, the same on all hosts that share it; ``None`` for no file."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _folder_of_host(needed: bool) -> tuple[Path | None, bool]:
    """A temporary folder for those ranks of a host who need one, and whether this rank fills it. Collective."""
    host = socket.gethostname()
    needy = from_all_ranks(host if needed else None)
    first = needed and needy.index(host) == dist.get_rank()
    mine = Path(tempfile.mkdtemp(prefix="spt-")) if first else None
    folders = from_all_ranks(mine)
    of_host = folders[needy.index(host)] if needed else None
    if of_host is not None and not of_host.exists():
        # Each rank in a container with a /tmp of its own.
        return Path(tempfile.mkdtemp(prefix="spt-")), True
    return of_host, first


def _send(path: Path, copy: Path | None) -> None:
    """Send rank 0's file to all ranks, those that have a place for it write it there. Collective."""
    source = path.open("rb") if dist.get_rank() == 0 else None
    target = copy.open("wb") if copy else None
    with source or nullcontext(), target or nullcontext():
        while True:
            chunk = [source.read(CHUNK_BYTES) if source else b""]
            dist.broadcast_object_list(chunk)
            if not chunk[0]:
                break
            if target:
                target.write(chunk[0])
    # The others of the host read it.
    from_all_ranks(None)
