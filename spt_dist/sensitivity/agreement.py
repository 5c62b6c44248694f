"""What the ranks tell one another during a pass: facts on which they have to agree, and failures.

Ranks meet in a fixed sequence of exchanges. One that fails says so at the exchange that is next for it, and every other
rank hears of it there instead of waiting for what will not come.
"""

from typing import TypeVar

import torch.distributed as dist

from spt_dist.errors import UserError
from spt_dist.sensitivity.shards import world_size

Fact = TypeVar("Fact")


class OtherRankFailed(UserError):
    """Another rank has failed; this one only stops with it."""


def exchange(fact: Fact) -> list[Fact]:
    """Every rank's fact, in the order of the ranks. Collective.

    Raises:
        OtherRankFailed: a rank has called ``announce_failure`` instead.
    """
    facts = _gather(fact)
    for rank, other in enumerate(facts):
        if isinstance(other, _Failure):
            raise OtherRankFailed(f"rank {rank} failed: {other.text}")
    return facts


def announce_failure(error: Exception) -> None:
    """Take part in the exchange that is next for the other ranks by telling them to stop."""
    if not isinstance(error, OtherRankFailed):
        _gather(_Failure(f"{type(error).__name__}: {error}"))


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _gather(fact: Fact) -> list[Fact]:
    facts = [fact]
    if world_size() > 1:
        facts = [fact] * world_size()
        dist.all_gather_object(facts, fact)
    return facts
