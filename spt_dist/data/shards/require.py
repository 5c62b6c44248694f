"""Finding out before a run whether all shards are there: the same on every rank."""

import hashlib
import logging
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch.distributed as dist

from spt_dist.data.shards.index import Shard, ShardIndex, Split
from spt_dist.data.shards.openers import is_local, open_stream, shown
from spt_dist.errors import UserError
from spt_dist.ranks import from_all_ranks, from_all_shares, own_share

_NUM_THREADS: Final = 16
_NUM_NAMED: Final = 3
_logger = logging.getLogger(__name__)


def load_index(location: str) -> ShardIndex:
    """``ShardIndex.load`` on every rank. Collective.

    Raises:
        UserError: on every rank: one can't load it, or they find different ones.
    """
    index, problem, text = None, "", ""
    try:
        index = ShardIndex.load(location)
        text = index.to_json()
    except UserError as error:
        problem = str(error)
    found = from_all_ranks((problem, hashlib.sha256(text.encode()).hexdigest()))
    problems = [problem for problem, _ in found if problem]
    if problems:
        raise UserError(problems[0])
    if len({digest for _, digest in found}) > 1:
        raise UserError(f"{shown(location, 'index.json')}: is not the same on every rank; all have to read the same")
    assert index is not None
    return index


def require_shards(location: str, split: Split) -> None:
    """Look whether every shard of a split is there, each rank at some of them. Collective.

    A file has to have the size that the index says; of others the first header is read.

    Args:
        location: where the shards are.
        split: of the index.

    Raises:
        UserError: on every rank, the same: some are missing; names the first three.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        problems = list(pool.map(lambda shard: _problem(location, shard), own_share(split.shards)))
    missing = [problem for problem in from_all_shares(problems) if problem]
    if missing:
        more = f"; and {len(missing) - _NUM_NAMED:,} more" * (len(missing) > _NUM_NAMED)
        raise UserError(
            f"{len(missing):,} of {len(split.shards):,} shards can't be used: {'; '.join(missing[:_NUM_NAMED])}{more}"
        )


def check_lanes(lanes: int, window: int) -> None:
    """Refuse lanes and windows that can't be, and say, on rank 0, where several ranks have to read the same shards.

    Raises:
        UserError: one is below 1.
    """
    for name, value in (("lanes", lanes), ("window", window)):
        if value < 1:
            raise UserError(f"config: data.{name}={value} has to be 1 or more")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if lanes % world_size and rank == 0:
        enough = -(-lanes // world_size) * world_size
        _logger.warning(
            "data.lanes=%d is no multiple of %d ranks: several read the same; take %d", lanes, world_size, enough
        )


def _problem(location: str, shard: Shard) -> str:
    path = shown(location, shard.name)
    try:
        if is_local(location):
            num_bytes = os.stat(path).st_size
            wrong = num_bytes != shard.num_bytes
            return f"{path} has {num_bytes:,} bytes, not {shard.num_bytes:,} as the index says" if wrong else ""
        stream = open_stream(location, shard.name)
        try:
            block = stream.read(tarfile.BLOCKSIZE)
            failure = stream.failure() if len(block) < tarfile.BLOCKSIZE else ""
        finally:
            stream.close()
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    except tarfile.HeaderError:
        return f"{path}: {failure or f'no tar file; it begins with {block[:16]!r}'}"
    return ""
