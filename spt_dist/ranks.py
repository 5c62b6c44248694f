"""What ranks tell each other, and doing what only one of a host has to do."""

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch.distributed as dist

from spt_dist.background import in_background
from spt_dist.errors import UserError

T = TypeVar("T")

SECONDS_BETWEEN_LOOKS = 0.2


def from_all_ranks(value: T) -> list[T]:
    """The values of all ranks, in their order. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(find: Callable[[], T]) -> T:
    """What ``find`` returns on rank 0, on every rank. Collective.

    Raises:
        UserError: from ``find``, on all ranks.
    """
    found: T | UserError | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = find()
        except UserError as error:
            found = error
    said = from_all_ranks(found)[0]
    if isinstance(said, UserError):
        raise said
    return said  # type: ignore[return-value]  # None only where T is


def own_share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of work that all ranks share: every item whose number is its own, modulo their number."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return items[rank::world_size]


def from_all_shares(results: Sequence[T]) -> list[T]:
    """What all ranks found for the items of ``own_share``, in the order of the items. Collective."""
    shares = from_all_ranks(results)
    return [shares[index % len(shares)][index // len(shares)] for index in range(sum(map(len, shares)))]


def host_first(work: Callable[[], T]) -> T:
    """Call ``work`` on rank 0, then on one rank of each other host, then on the rest; returns its result. Collective.

    So what it downloads and keeps is fetched once where hosts share the folder, and once a host where they don't. It
    may take as long as it likes: those who wait ask each other whether they are through. Once it has failed on a rank
    no other begins.

    Raises:
        Exception: from ``work``, on all ranks.
    """
    hosts = from_all_ranks(socket.gethostname())
    rank = dist.get_rank() if dist.is_initialized() else 0
    # 0 for rank 0, 1 for the first of another host, 2 for the rest.
    turn = 0 if rank == 0 else 2 if hosts[rank] in hosts[:rank] else 1
    mine: Future[T] | None = None
    for current in range(3):
        if current == turn:
            mine = in_background(work)
        while not all(from_all_ranks(mine is None or mine.done())):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        for error in from_all_ranks(_sendable(mine.exception()) if mine else None):
            if error is not None:
                raise error
    assert mine is not None
    return mine.result()


def _sendable(error: BaseException | None) -> BaseException | None:
    """What the others raise: a mistake as it is, of anything else what it says."""
    return error if error is None or isinstance(error, UserError) else RuntimeError(repr(error))
