"""Sensitivity patterns: where the most sensitive weights of a backbone lie (SPT, Figures 1a and 4)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import torch

from spt_dist.errors import UserError
from spt_dist.files import write_text
from spt_dist.report.grid import Array, Layout, lay_out
from spt_dist.sensitivity.scores import Scores
from spt_dist.sensitivity.selection import count_selected, top_tau
from spt_dist.sensitivity.shards import all_sum, restrict
from spt_dist.tables import format_table

TAUS = (0.001, 0.01, 0.05)


@dataclass(frozen=True, eq=False)
class Patterns:
    """How many of the most sensitive weights lie in each tensor, for several numbers of them.

    Attributes:
        names: logical names of the tensors, in the model's order.
        sizes: ``(num_names,)`` int64, weights of each tensor.
        taus: numbers of most sensitive weights, ascending.
        counts: ``(num_taus, num_names)`` int64, how many of them lie in each tensor; row ``t`` sums to ``taus[t]``.
    """

    names: tuple[str, ...]
    sizes: Array
    taus: tuple[int, ...]
    counts: Array

    @property
    def num_weights(self) -> int:
        """Weights of all tensors."""
        return int(self.sizes.sum())

    @property
    def labels(self) -> list[str]:
        """Each tau as a share of all weights: "top 0.1%"."""
        percents = [100 * tau / self.num_weights for tau in self.taus]
        return [f"top {percent:.{3 if percent > 10 else 2}g}%" for percent in percents]

    @cached_property
    def layout(self) -> Layout:
        """The tensors' blocks and operations."""
        return lay_out(self.names)

    def by_block(self) -> tuple[Array, Array]:
        """Weights ``(num_columns,)`` and sensitive weights ``(num_taus, num_columns)`` of ``layout.columns``, int64."""
        return self._add_up(self.layout.cols, len(self.layout.columns))

    def by_operation(self) -> tuple[Array, Array]:
        """Weights ``(num_operations,)`` and sensitive ones ``(num_taus, num_operations)`` of ``layout.operations``."""
        return self._add_up(self.layout.rows, len(self.layout.operations))

    def densities(self) -> Array:
        """Sensitive weights of each block's operation over all its weights.

        Returns:
            ``(num_taus, num_operations, num_columns)`` float64 from 0 to 1, NaN where a block has no such operation.
        """
        shape = len(self.layout.operations), len(self.layout.columns)
        weights, sensitive = self._add_up(self.layout.rows * shape[1] + self.layout.cols, prod(shape))
        return np.where(weights > 0, sensitive / np.maximum(weights, 1), np.nan).reshape(-1, *shape)

    def table(self) -> str:
        """Share of each operation among all weights and among the most sensitive ones."""
        weights, sensitive = self.by_operation()
        groups = [(self.num_weights, weights), *zip(self.taus, sensitive, strict=True)]
        rows = [
            [operation, f"{weights[row]:,}", *(f"{counts[row] / total:.2%}" for total, counts in groups)]
            for row, operation in enumerate(self.layout.operations)
        ]
        rows.append(["total", *(f"{total:,}" for total in (self.num_weights, self.num_weights, *self.taus))])
        title = "where the most sensitive weights lie: share of each operation, over all blocks"
        return format_table(title, ["operation", "weights", "of all", *(f"of {label}" for label in self.labels)], rows)

    def save(self, path: str | Path) -> Path:
        """Write JSON: ``taus``, and for each tensor its name, block, operation, weights and how many are sensitive."""
        tensors = [
            {
                "name": name,
                "block": self.layout.columns[self.layout.cols[place]],
                "operation": self.layout.operations[self.layout.rows[place]],
                "weights": int(self.sizes[place]),
                "sensitive": self.counts[:, place].tolist(),
            }
            for place, name in enumerate(self.names)
        ]
        return write_text(path, json.dumps({"kind": "patterns", "taus": self.taus, "tensors": tensors}))

    def _add_up(self, groups: Array, num_groups: int) -> tuple[Array, Array]:
        """Sizes and counts of the tensors, added up by group; ``groups`` holds each tensor's."""
        # Float sums of counts are exact up to 2^53.
        sums = [np.bincount(groups, row, num_groups).astype(np.int64) for row in (self.sizes, *self.counts)]
        return sums[0], np.stack(sums[1:])


def find_patterns(scores: Scores, taus: Sequence[int | float] = TAUS) -> Patterns:
    """Count the most sensitive weights of each tensor. Collective; nothing but counts leaves a rank.

    They are taken from the weights that ``allocate`` chooses from: all that are scored but those always tuned.

    Args:
        scores: the result of stage 1.
        taus: numbers of most sensitive weights, see ``resolve_taus``.

    Raises:
        UserError: as ``resolve_taus``.
    """
    shard = restrict(scores.shard, scores.selectable)
    resolved = resolve_taus(taus, shard.index.total)
    counts = [count_selected(shard, top_tau(shard, tau)).numpy() for tau in resolved]
    sizes = np.array([prod(shape) for shape in shard.index.shapes], dtype=np.int64)
    return Patterns(shard.index.names, sizes, resolved, np.stack(counts))


def mean_scores(scores: Scores) -> dict[str, float]:
    """Logical name -> mean score of its weights. Collective; nothing but sums leaves a rank."""
    shard = scores.shard
    sums = torch.zeros(len(shard.index.names), dtype=torch.float64, device=shard.values.device)
    for place, part, _ in shard.segments():
        sums[place] = shard.values[part].sum(dtype=torch.float64)
    totals = zip(shard.index.names, all_sum(sums).tolist(), shard.index.shapes, strict=True)
    return {name: total / prod(shape) for name, total, shape in totals}


def parse_taus(texts: Sequence[str] | None) -> Sequence[int | float]:
    """Taus as they are typed: "1000" is a count, "0.01" and "1e-2" are fractions; ``None`` for the usual ones.

    Raises:
        UserError: one is not a number.
    """
    if texts is None:
        return TAUS
    try:
        return [int(text) if text.isdecimal() else float(text) for text in texts]
    except ValueError:
        raise UserError(f"tau={' '.join(texts)}: a tau is a number of weights (1000) or a fraction (0.01)") from None


def resolve_taus(taus: Sequence[int | float], num_weights: int) -> tuple[int, ...]:
    """Numbers of most sensitive weights, ascending and each once.

    Args:
        taus: counts, or fractions of ``num_weights``: floats up to 1, of which the smallest mean one weight.
        num_weights: how many weights there are to choose from.

    Raises:
        UserError: a tau is not positive, above ``num_weights``, or a float above 1.
    """
    for tau in taus:
        if isinstance(tau, float) and not 0 < tau <= 1:
            raise UserError(f"tau={tau}: a fraction lies between 0 and 1, a count is a whole number")
        if not 0 < tau <= num_weights:
            raise UserError(f"tau={tau}: has to lie between 1 and the {num_weights:,} weights there are")
    return tuple(sorted({max(1, round(tau * num_weights)) if isinstance(tau, float) else tau for tau in taus}))
