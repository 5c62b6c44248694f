"""An exact threshold over values that are spread over ranks, found digit by digit of their bit patterns.

Non-negative floats order like their bit patterns, 31-bit integers. Each round counts every name's values by their next
digit, narrows the digit down with one small all-reduce a step, and goes on with the values that have the digit found.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spt_dist.sensitivity.shards import all_sum

# Widths of the digits, highest first: 31 bits in all. The first one is the exponent and three bits of the mantissa.
_DIGITS = (11, 10, 10)
# Into how many intervals a step divides the digits that are still possible: more make fewer but larger all-reduces.
_WAYS = 16
# Values handled at a time, few enough for their intermediate results to stay in the CPU's caches.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Crossing:
    """The lowest bit pattern that can be a threshold, because the values above it fit.

    Attributes:
        bits: the pattern; at least one value has it.
        above: int64 on the CPU: for each name, how many values of all ranks exceed it.
        ties: int64 on the CPU: for each name, how many values of all ranks equal it.
    """

    bits: int
    above: Tensor
    ties: Tensor


def find_crossing(
    parts: Mapping[int, Tensor], num_names: int, device: torch.device, fits: Callable[[Tensor], bool]
) -> Crossing | None:
    """How low a threshold may go. Collective: 11 all-reduces of up to 15 integers a name, whatever the values.

    Args:
        parts: a name's place -> int32 bit patterns of this rank's values of it; sign bits are ignored.
        num_names: number of places, the same on every rank.
        device: where ``parts`` lie.
        fits: whether these counts of each name (int64, on the CPU) are few enough. Zeros are; and if some counts are
            not, larger ones are not either. Called with the same counts on every rank.

    Returns:
        The crossing, or ``None`` if all values fit.
    """
    sizes = torch.zeros(num_names, dtype=torch.int64, device=device)
    for place, part in parts.items():
        sizes[place] = len(part)
    if fits(all_sum(sizes).cpu()):
        return None
    above = ties = torch.zeros_like(sizes)
    bits, shift = 0, sum(_DIGITS)
    for width in _DIGITS:
        shift -= width
        # Column d: for each name, the values with digit d or a higher one.
        counts = _digit_counts(parts, num_names, device, shift, width)
        digit, span = 0, 1 << width
        while span > 1:
            step = max(span // _WAYS, 1)
            counts_at = all_sum(above[:, None] + counts[:, digit + step : digit + span : step]).cpu()
            digit += step * bisect_left(counts_at.unbind(1), True, key=fits)
            span = step
        bits |= digit << shift
        ties = counts[:, digit] - counts[:, digit + 1]
        above = above + counts[:, digit + 1]
        parts = _with_digit(parts, ties.tolist(), shift, width, digit)
    above, ties = all_sum(torch.stack([above, ties])).cpu()
    return Crossing(bits, above, ties)


def _digit_counts(parts: Mapping[int, Tensor], num_names: int, device: torch.device, shift: int, width: int) -> Tensor:
    """``(num_names, 2 ** width + 1)`` int64: of each name, this rank's values with a digit of at least the column's."""
    counts = torch.zeros(num_names, (1 << width) + 1, dtype=torch.int64, device=device)
    for place, part in parts.items():
        for chunk in part.split(CHUNK):
            counts[place, :-1] += torch.bincount(_digit(chunk, shift, width), minlength=1 << width)
    return counts.flip(1).cumsum(1).flip(1)


def _with_digit(parts: Mapping[int, Tensor], sizes: list[int], shift: int, width: int, digit: int) -> dict[int, Tensor]:
    """The values that have a digit, ``sizes[place]`` of each name."""
    kept = {}
    for place, part in parts.items():
        if sizes[place] == len(part):
            kept[place] = part
        elif sizes[place]:
            chunks = part.split(CHUNK)
            kept[place] = torch.cat([chunk[_digit(chunk, shift, width) == digit] for chunk in chunks])
    return kept


def _digit(bits: Tensor, shift: int, width: int) -> Tensor:
    return (bits >> shift) & ((1 << width) - 1)
