"""The allocation of SPT's published code, as it is in ``get_sensitivity`` of github.com/ziplab/SPT (engine.py).

It differs from the paper's: parameters are sorted by words in their names, and the budget is not solved for. A sweep
over fixed numbers of sensitive weights takes the one whose trainable parameters come nearest to the budget, so the
result may exceed it as well as fall short of it.
"""

import math
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.sensitivity.selection import Threshold, count_selected, top_tau
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, all_sum, get_rank, world_size

# Names with one of these words take no part: the head and cls_token are tuned whole, the rest is frozen.
LEFT_OUT = ("head", "cls_token", "patch_embed", "pos_embed")
# Looked for first, so that the weight of a norm counts as a vector: whole once 1 / beta of it is sensitive.
VECTORS = ("norm", "bias")
# A structured module once cost / alpha of the weights are sensitive.
MATRICES = (".q.", ".k.", ".v.", "proj", "fc")
# 0.02 M to 1.58 M sensitive weights, rounding errors included: four of them are one above a multiple of 20,000.
TAUS = tuple(math.ceil(step * 0.02 * 1e6) for step in range(1, 80))


def eligible_names(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that the published code ranks."""
    return [name for name in names if not _has_one_of(LEFT_OUT, name)]


def matrix_names(names: Collection[str], linear_weights: Iterable[str]) -> set[str]:
    """Those of the eligible ``names`` that may get a structured module; the others are vectors.

    Args:
        names: from ``eligible_names``.
        linear_weights: names that can take a structured module at all.

    Raises:
        UserError: a name that the published code would not know what to do with.
    """
    matrices = {name for name in names if not _has_one_of(VECTORS, name)}
    known = {name for name in matrices.intersection(linear_weights) if _has_one_of(MATRICES, name)}
    unknown = [name for name in names if name in matrices - known]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f'preset="released" knows the names of plain Vision Transformers only and has no rule for '
            f'{", ".join(unknown[:5])}{more}; use preset="paper", or alpha=10 and beta=5 without a preset'
        )
    return known


def sweep(shard: ScoreShard, total: Callable[[Tensor], int], budget: int) -> Threshold:
    """The most sensitive weights, as many of ``TAUS`` as bring ``total`` nearest to ``budget``. Collective.

    At equal distance the larger number wins. The distance to beat is ``budget`` at first, so a total above twice the
    budget is never taken. (The published code measures distances in fp32 and in millions, which may turn an exact tie
    the other way.)

    Args:
        shard: this rank's scores of the eligible names.
        total: trainable parameters in all for the selected counts of each name (int64, in the order of the index).
        budget: wanted number of trainable parameters.

    Raises:
        UserError: no total comes within twice the budget; or there are too few scores for a sweep.
    """
    taus = [tau for tau in TAUS if tau <= shard.index.total]
    if not taus:
        raise UserError(
            f'preset="released" tries {TAUS[0]:,} sensitive weights and more, but this model has {shard.index.total:,} '
            "to choose from; give tau= instead of a budget, or alpha=10 and beta=5 without a preset"
        )
    candidates = highest_scores(shard, taus[-1])
    best: Threshold | None = None
    distance = budget
    totals = []
    for tau in taus:
        threshold = top_tau(candidates, tau)
        totals.append(total(count_selected(candidates, threshold)))
        if abs(totals[-1] - budget) <= distance:
            best, distance = threshold, abs(totals[-1] - budget)
    if best is None:
        raise UserError(
            f'budget={budget:,}: preset="released" takes nothing above twice the budget, and its smallest choice, '
            f"{taus[0]:,} sensitive weights, makes {totals[0]:,} trainable parameters; give at least "
            f"{-(-totals[0] // 2):,}, or tau= instead"
        )
    return best


def highest_scores(shard: ScoreShard, tau: int) -> ScoreShard:
    """The ``tau`` highest scores and whatever equals the lowest of them, as scores of shorter tensors. Collective.

    Selecting ``tau`` or fewer from them gives the same set as from all scores, sooner.
    """
    lowest = torch.tensor(top_tau(shard, tau).bits, dtype=torch.int32).view(torch.float32).item()
    kept = [shard.values[:0]]
    counts = torch.zeros(world_size(), len(shard.index.names), dtype=torch.int64, device=shard.values.device)
    for place, part, _ in shard.segments():
        scores = shard.values[part]
        kept.append(scores[scores >= lowest])
        counts[get_rank(), place] = len(kept[-1])
    all_sum(counts)
    shapes = tuple((count,) for count in counts.sum(dim=0).tolist())
    return ScoreShard(FlatIndex(shard.index.names, shapes), int(counts[: get_rank()].sum()), torch.cat(kept))


def _has_one_of(words: Iterable[str], name: str) -> bool:
    return any(word in name for word in words)
