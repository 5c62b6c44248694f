"""The global top-tau over sharded scores, exact and the same for every number of ranks.

Non-negative floats order like their bit patterns, so a threshold is a 31-bit integer, found by a radix search that
adds up small counts of each name over the ranks. No rank ever sees another's scores. Equal scores are taken in the
order of their flat index.

Few scores are selected as a rule, so most are seen once only, as part of a block of neighbours of which the highest
is too low.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.sensitivity.radix import CHUNK, Crossing, find_crossing
from spt_dist.sensitivity.shards import ScoreShard, all_sum, get_rank, world_size

_INFINITY_BITS = 0x7F800000
_NO_SIGN = 0x7FFFFFFF
_BLOCK = 32


@dataclass(frozen=True)
class Threshold:
    """A set of weights: every score whose bits exceed ``bits``, and the first ``num_ties`` scores equal to it."""

    bits: int
    num_ties: int


NOTHING = Threshold(_INFINITY_BITS, 0)
EVERYTHING = Threshold(-1, 0)


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
    found = _find_crossing(shard, lambda counts: int(counts.sum()) < tau)
    return Threshold(found.bits, tau - int(found.above.sum()))


def solve_threshold(shard: ScoreShard, total: Callable[[Tensor], int], limit: int) -> Threshold:
    """The largest set of highest scores whose ``total`` does not exceed ``limit``. Collective.

    Args:
        shard: this rank's scores: finite and non-negative.
        total: a function of the selected count of each name (int64, in the order of the index) that never
            decreases as the counts grow.
        limit: the most that ``total`` may be. ``total`` of nothing has to be within it.
    """

    def fits(counts: Tensor) -> bool:
        return total(counts) <= limit

    if fits(torch.tensor([prod(shape) for shape in shard.index.shapes], dtype=torch.int64)):
        return EVERYTHING
    found = _find_crossing(shard, fits)
    # All scores above the crossing fit and adding all that equal it does not: find how many of those do.
    fitting, too_many = 0, int(found.ties.sum())
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(found.above + _first(found.ties, middle)):
            fitting = middle
        else:
            too_many = middle
    return Threshold(found.bits, fitting)


def count_selected(shard: ScoreShard, threshold: Threshold) -> Tensor:
    """How many weights of each name are selected: int64, in the order of the index. Collective."""
    counts = torch.zeros(2, len(shard.index.names), dtype=torch.int64, device=shard.values.device)
    for place, part, _ in shard.segments():
        counts[0, place] = _count(shard.values[part], torch.gt, threshold.bits)
        if threshold.num_ties:
            counts[1, place] = _count(shard.values[part], torch.eq, threshold.bits)
    above, ties = all_sum(counts).cpu()
    return above + _first(ties, threshold.num_ties)


def selected_positions(shard: ScoreShard, threshold: Threshold, names: Iterable[str]) -> dict[str, Tensor]:
    """The selected weights of some named tensors, on every rank. Collective.

    Returns:
        name -> sorted int64 flat row-major positions within that tensor, on the CPU; only their indices travel.
    """
    wanted = {shard.index.position[name] for name in names}
    above, ties, num_held = {}, {}, {}
    for place, part, first in shard.segments():
        if place in wanted:
            bits, blocks = _open_high_blocks(shard.values[part], threshold.bits)
            above[place] = first + _places(bits > threshold.bits, blocks)
            ties[place] = first + _places(bits == threshold.bits, blocks)
            num_held[place] = len(ties[place])
        elif threshold.num_ties:
            num_held[place] = int(_count(shard.values[part], torch.eq, threshold.bits))
    shares = _tie_shares(num_held, threshold.num_ties, shard.values.device)
    mine = {
        shard.index.names[place]: torch.cat([above[place], ties[place][: shares[place]]]).sort().values.cpu()
        for place in above
    }
    everyone: list[dict[str, Tensor]] = [mine]
    if world_size() > 1:
        everyone = [{} for _ in range(world_size())]
        dist.all_gather_object(everyone, mine)
    ordered = [shard.index.names[place] for place in sorted(wanted)]
    return {name: torch.cat([part[name] for part in everyone if name in part]) for name in ordered}


def _find_crossing(shard: ScoreShard, fits: Callable[[Tensor], bool]) -> Crossing:
    """How low a threshold may go for the counts above it to fit; those of all scores must not."""
    num_names, device = len(shard.index.names), shard.values.device
    parts = {place: shard.values[part].view(torch.int32) for place, part, _ in shard.segments()}
    highest = {place: _blocks(part).amax(dim=1) for place, part in parts.items()}
    # No more blocks have their highest score above a threshold than there are scores above it. So where the blocks do
    # not fit, the scores do not either, and what lies below the blocks' crossing need not be looked at.
    rough = find_crossing(highest, num_names, device, fits)
    if rough is not None:
        for place, part in parts.items():
            blocks = _reaching(highest[place], rough.bits)
            # Most of a part is not worth a copy.
            if 2 * len(blocks) < len(highest[place]):
                parts[place] = _open(part, blocks)
    found = find_crossing(parts, num_names, device, fits)
    assert found is not None
    return found


def _blocks(part: Tensor) -> Tensor:
    """``(num_blocks, _BLOCK)`` view of a part, without the shorter block at its end."""
    return part[: len(part) // _BLOCK * _BLOCK].view(-1, _BLOCK)


def _reaching(highest: Tensor, bits: int) -> Tensor:
    """Numbers of the blocks that hold a score of at least ``bits``, given the pattern of each block's highest."""
    return (_unsigned(highest, bits) >= bits).nonzero().flatten()


def _open(part: Tensor, blocks: Tensor) -> Tensor:
    """The scores of some blocks, and of the shorter block at the end."""
    return torch.cat([_blocks(part)[blocks].flatten(), part[len(part) // _BLOCK * _BLOCK :]])


def _open_high_blocks(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Bit patterns of the scores in blocks that reach ``bits``, and those blocks' numbers, a shorter last one's too."""
    part = values.view(torch.int32)
    blocks = _reaching(_blocks(part).amax(dim=1), bits)
    last = blocks.new_tensor([len(part) // _BLOCK])
    return _unsigned(_open(part, blocks), bits), torch.cat([blocks, last])


def _places(mask: Tensor, blocks: Tensor) -> Tensor:
    """Positions within a part of the marked scores of its opened blocks."""
    marked = mask.nonzero().flatten()
    return blocks[marked // _BLOCK] * _BLOCK + marked % _BLOCK


def _count(values: Tensor, compare: Callable[..., Tensor], bits: int) -> Tensor:
    """How many scores ``compare`` with ``bits`` (``torch.gt`` or ``torch.eq``): int64, on the device of the scores."""
    counts = torch.zeros((), dtype=torch.int64, device=values.device)
    for chunk in values.view(torch.int32).split(CHUNK):
        patterns = _unsigned(chunk, bits)
        # Comparisons are vectorised only if their result has the type of their input.
        counts += compare(patterns, bits, out=torch.empty_like(patterns)).sum(dtype=torch.int32)
    return counts


def _tie_shares(num_held: dict[int, int], num_ties: int, device: torch.device) -> dict[int, int]:
    """How many of the first ``num_ties`` ties of all ranks this rank holds of each name. Collective.

    Args:
        num_held: place of a name -> how many ties this rank holds of it, in the order of the index.
        num_ties: how many ties are selected.
        device: where this rank's scores lie.
    """
    held = torch.tensor(list(num_held.values()), dtype=torch.int64)
    of_ranks = torch.zeros(world_size(), dtype=torch.int64, device=device)
    of_ranks[get_rank()] = held.sum()
    share = _first(all_sum(of_ranks).cpu(), num_ties)[get_rank()]
    return dict(zip(num_held, _first(held, int(share)).tolist(), strict=True))


def _first(counts: Tensor, wanted: int) -> Tensor:
    """How many of the first ``wanted`` things lie in each of several consecutive groups of ``counts`` things."""
    before = counts.cumsum(0) - counts
    return (wanted - before).clamp(min=0).minimum(counts)


def _unsigned(bits: Tensor, threshold: int) -> Tensor:
    """Bit patterns ready to be compared with ``threshold``."""
    # Only -0.0 has a sign, and only a threshold of zero or below takes in zeros.
    return bits & _NO_SIGN if threshold <= 0 else bits
