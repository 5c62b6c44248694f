"""Pictures of scores, plans and losses, as PNG files."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from spt_dist.allocation.plan import Plan
from spt_dist.report.grid import Array, to_grid


def draw_scores(means: Mapping[str, float], path: str | Path) -> Path:
    """Mean sensitivity of each block's operations, on a logarithmic scale.

    Args:
        means: logical name -> mean score.
        path: the PNG file.
    """
    grid, operations, columns = to_grid(means)
    figure, axes = _new_figure(len(columns), len(operations))
    # Scores span many orders of magnitude, and attn.k.bias, which is exactly insensitive, is rounding noise.
    top = float(np.nanmax(grid))
    bottom = float(np.nanmin(grid[grid > top * 1e-7]))
    image = axes.imshow(
        np.maximum(grid, bottom / 10), norm=LogNorm(vmin=bottom, vmax=top), cmap="viridis", aspect="auto"
    )
    _label(axes, operations, columns)
    axes.set_title("mean sensitivity of a weight")
    figure.colorbar(image, ax=axes, extend="min")
    return _save(figure, path)


def draw_plan(plan: Plan, path: str | Path) -> Path:
    """What is tuned: the share of trained parameters in each tensor, and which matrices are structured.

    Args:
        plan: the plan.
        path: the PNG file.
    """
    trained = {name: float(len(indices)) for name, indices in plan.sparse.items()}
    trained |= {name: float(prod(plan.shapes[name])) for name in (*plan.vectors, *plan.parameters)}
    structured = {name: 1.0 for name in plan.matrices}
    everything = dict.fromkeys([*plan.shapes], 0.0)
    grid, operations, columns = to_grid(everything | trained)
    flags, _, _ = to_grid(everything | structured)
    figure, axes = _new_figure(len(columns), len(operations))
    axes.imshow(
        np.where(grid > 0, np.log10(np.maximum(grid, 1)), np.nan), cmap="Oranges", aspect="auto", vmin=-0.5, vmax=4
    )
    for row, column in np.argwhere(flags > 0):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="tab:blue", edgecolor="white"))
    _write_counts(axes, grid, flags, plan.rank)
    _label(axes, operations, columns)
    legend = "blue: low-rank module; orange: weights tuned one by one or whole vectors"
    figure.suptitle(f"{plan.num_trainable:,} trained parameters\n{legend}", fontsize=10)
    return _save(figure, path)


def draw_losses(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> Path:
    """Training loss and held-out accuracy of several runs.

    Args:
        curves: label -> lines of ``metrics.jsonl``.
        path: the PNG file.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for label, lines in curves.items():
        steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        tops = [(line["step"], 100 * line["top1"]) for line in lines if "top1" in line]
        losses.plot(*zip(*steps, strict=True), label=label, linewidth=1)
        accuracies.plot(*zip(*tops, strict=True), label=label, marker="o")
    losses.set(xlabel="step", ylabel="training loss", yscale="log")
    accuracies.set(xlabel="step", ylabel="top-1 on held-out samples, %")
    accuracies.legend()
    return _save(figure, path)


def _write_counts(axes: Axes, grid: Array, flags: Array, rank: int) -> None:
    for (row, column), count in np.ndenumerate(grid):
        if flags[row, column] > 0:
            axes.text(column, row, f"r{rank}", ha="center", va="center", color="white", fontsize=7)
        elif count > 0:
            axes.text(column, row, f"{int(count)}", ha="center", va="center", fontsize=7)


def _new_figure(num_columns: int, num_rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(max(7.0, 0.5 * num_columns + 3.5), max(3.0, 0.3 * num_rows + 1.2)), layout="constrained")
    return figure, figure.subplots()


def _label(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlabel("block")


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No interactive backend is wanted, or even there, on a cluster's nodes.
    matplotlib.use("agg")
    figure.savefig(path, dpi=150)
    return path
