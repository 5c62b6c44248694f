"""The global top-tau over sharded scores, exact and the same for every number of ranks.

Non-negative floats order like their bit patterns, so a threshold is a 31-bit integer: two rounds of 2^16-bin
histograms find it, one all-reduce each, whatever the number of weights. Equal scores are taken in the order of
their flat index. No rank ever sees another's scores.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.sensitivity.shards import ScoreShard, all_sum, get_rank, world_size

_BINS = 1 << 16
_INFINITY_BITS = 0x7F800000
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Threshold:
    """A set of weights: every score whose bits exceed ``bits``, and the first ``num_ties`` scores equal to it."""

    bits: int
    num_ties: int


NOTHING = Threshold(_INFINITY_BITS, 0)


def top_tau(shard: ScoreShard, tau: int) -> Threshold:
    """The set of the ``tau`` highest scores. Collective.

    Args:
        shard: this rank's scores: finite and non-negative.
        tau: 0 .. number of weights.

    Raises:
        UserError: ``tau`` is out of range.
    """
    if not 0 <= tau <= shard.index.total:
        raise UserError(f"tau={tau}: has to lie between 0 and the {shard.index.total} scored weights")
    if tau == 0:
        return NOTHING
    bits = score_bits(shard)
    high, above = _find_bin(_histogram(bits, lambda chunk: chunk >> 16), tau)
    low, equal_above = _find_bin(
        _histogram(bits, lambda chunk: chunk[chunk >> 16 == high] & (_BINS - 1)),
        tau - above,
    )
    return Threshold((high << 16) | low, tau - above - equal_above)


def solve_threshold(shard: ScoreShard, total: Callable[[Tensor], int], limit: int) -> Threshold:
    """The largest set of highest scores whose ``total`` does not exceed ``limit``. Collective.

    Args:
        shard: this rank's scores.
        total: a function of the selected count of each name (int64, in the order of the index) that never
            decreases as the counts grow.
        limit: the most that ``total`` may be. ``total`` of nothing has to be within it.

    Returns:
        The threshold; bisection takes 31 small all-reduces, and as many as ties have bits.
    """
    bits = score_bits(shard)

    def fits(threshold: Threshold) -> bool:
        return total(count_selected(shard, threshold, bits)) <= limit

    if fits(Threshold(-1, 0)):
        return Threshold(-1, 0)
    too_low, enough = -1, _INFINITY_BITS
    while enough - too_low > 1:
        middle = (too_low + enough) // 2
        too_low, enough = (too_low, middle) if fits(Threshold(middle, 0)) else (middle, enough)
    # All scores above `enough` fit and adding all that equal it does not: find how many of those do.
    fitting, too_many = 0, int(all_sum((bits == enough).sum()))
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(Threshold(enough, middle)) else (fitting, middle)
    return Threshold(enough, fitting)


def count_selected(shard: ScoreShard, threshold: Threshold, bits: Tensor | None = None) -> Tensor:
    """How many weights of each name are selected: int64, in the order of the index. Collective."""
    mask = _selected_mask(shard, threshold, score_bits(shard) if bits is None else bits)
    counts = torch.zeros(len(shard.index.names), dtype=torch.int64, device=shard.values.device)
    for place, part, _ in shard.segments():
        counts[place] = mask[part].sum()
    return all_sum(counts).cpu()


def selected_positions(shard: ScoreShard, threshold: Threshold, names: Iterable[str]) -> dict[str, Tensor]:
    """The selected weights of some named tensors, on every rank. Collective.

    Returns:
        name -> sorted int64 flat row-major positions within that tensor, on the CPU; only their indices travel.
    """
    mask = _selected_mask(shard, threshold, score_bits(shard))
    wanted = {shard.index.position[name] for name in names}
    mine = {
        shard.index.names[place]: (mask[part].nonzero().flatten() + first).cpu()
        for place, part, first in shard.segments()
        if place in wanted
    }
    everyone: list[dict[str, Tensor]] = [mine]
    if world_size() > 1:
        everyone = [{} for _ in range(world_size())]
        dist.all_gather_object(everyone, mine)
    ordered = [shard.index.names[place] for place in sorted(wanted)]
    return {name: torch.cat([part[name] for part in everyone if name in part]) for name in ordered}


def score_bits(shard: ScoreShard) -> Tensor:
    """The scores' bit patterns as int32, which order like the scores."""
    # Adding zero turns -0.0, whose pattern is negative, into +0.0.
    return (shard.values + 0.0).view(torch.int32)


def _selected_mask(shard: ScoreShard, threshold: Threshold, bits: Tensor) -> Tensor:
    mask = bits > threshold.bits
    if threshold.num_ties:
        ties = (bits == threshold.bits).nonzero().flatten()
        mask[ties[: _share_of_ties(len(ties), threshold.num_ties)]] = True
    return mask


def _share_of_ties(local_ties: int, num_ties: int) -> int:
    """How many of this rank's ties are among the first ``num_ties`` of all ranks'."""
    if world_size() == 1:
        return num_ties
    counts: list[int] = [0] * world_size()
    dist.all_gather_object(counts, local_ties)
    return min(max(num_ties - sum(counts[: get_rank()]), 0), local_ties)


def _histogram(bits: Tensor, bin_of: Callable[[Tensor], Tensor]) -> Tensor:
    counts = torch.zeros(_BINS, dtype=torch.int64, device=bits.device)
    # bincount works on int64 copies, so it goes in chunks of bounded memory.
    for chunk in bits.split(_CHUNK):
        counts += torch.bincount(bin_of(chunk), minlength=_BINS)
    return all_sum(counts)


def _find_bin(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the ``wanted``-th highest value, and how many values lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top >= wanted).nonzero()[0])
    above = int(from_top[place - 1]) if place else 0
    return _BINS - 1 - place, above
