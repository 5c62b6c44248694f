"""Pictures of scores, patterns and losses, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from spt_dist.evaluation.scores import METRIC_LABELS
from spt_dist.report.canvas import label_columns, label_grid, new_figure, save_figure
from spt_dist.report.grid import to_grid
from spt_dist.report.patterns import Patterns


def draw_scores(means: Mapping[str, float], path: str | Path) -> Path:
    """Mean sensitivity of each block's operations, on a logarithmic scale.

    Args:
        means: logical name -> mean score.
        path: the PNG file.
    """
    grid, operations, columns = to_grid(means)
    figure, axes = new_figure(len(columns), len(operations))
    # Scores span many orders of magnitude, and attn.k.bias, which is exactly insensitive, is rounding noise.
    top = float(np.nanmax(grid))
    bottom = float(np.nanmin(grid[grid > top * 1e-7]))
    image = axes.imshow(
        np.maximum(grid, bottom / 10), norm=LogNorm(vmin=bottom, vmax=top), cmap="viridis", aspect="auto"
    )
    label_grid(axes, operations, columns)
    axes.set_title("mean sensitivity of a weight")
    figure.colorbar(image, ax=axes, extend="min")
    return save_figure(figure, path)


def draw_block_patterns(patterns: Patterns, path: str | Path) -> Path:
    """Share of each block among the most sensitive weights (SPT, Figure 1a), beside its share of all weights.

    Args:
        patterns: counts for any number of taus, one line each.
        path: the PNG file.
    """
    columns, is_block = patterns.layout.columns, np.array(patterns.layout.is_block)
    weights, sensitive = patterns.by_block()
    figure = Figure(figsize=(max(9.0, 0.22 * len(columns) + 4.5), 4.0), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(columns))
    axes.bar(places, 100 * weights / patterns.num_weights, color="0.85", label="share of all weights")
    for tau, counts, label in zip(patterns.taus, sensitive, patterns.labels, strict=True):
        shares = 100 * counts / tau
        (line,) = axes.plot(places, np.where(is_block, shares, np.nan), "o-", markersize=4, label=f"{label} ({tau:,})")
        # What lies outside is no step on the way through the blocks.
        axes.plot(places[~is_block], shares[~is_block], "o", markersize=4, color=line.get_color())
    label_columns(axes, columns)
    axes.set(xlim=(-0.6, len(columns) - 0.4), ylim=(0, None), ylabel="share of the most\nsensitive weights, %")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    _add_legend(figure, axes)
    return save_figure(figure, path)


def draw_operation_patterns(patterns: Patterns, path: str | Path) -> Path:
    """Share of each operation among the most sensitive weights (SPT, Figure 4), and their share in each operation.

    Args:
        patterns: counts for any number of taus, one colour each.
        path: the PNG file.
    """
    operations = patterns.layout.operations
    weights, sensitive = patterns.by_operation()
    figure = Figure(figsize=(11.0, max(3.0, 0.2 * len(operations) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(operations))
    left.barh(places, 100 * weights / patterns.num_weights, color="0.85", label="share of all weights")
    for tau, counts, label in zip(patterns.taus, sensitive, patterns.labels, strict=True):
        left.plot(100 * counts / tau, places, "o", markersize=5, label=f"{label} ({tau:,})")
        # A logarithmic axis has no place for an operation without sensitive weights.
        right.plot(np.where(counts > 0, 100 * counts / weights, np.nan), places, "o", markersize=5)
    left.set_yticks(places, operations)
    left.set(ylim=(len(operations) - 0.4, -0.6), xlim=(0, None), xlabel="share of the most sensitive weights, %")
    right.set(xscale="log", xlabel="share of the operation's weights, %")
    right.xaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    _add_legend(figure, left)
    return save_figure(figure, path)


def draw_densities(patterns: Patterns, path: str | Path) -> Path:
    """Which part of each block's operations is among the most sensitive weights, one panel a tau.

    Args:
        patterns: counts for any number of taus.
        path: the PNG file.
    """
    operations, columns = patterns.layout.operations, patterns.layout.columns
    size = max(7.0, 0.22 * len(columns) + 4.0), (0.19 * len(operations) + 0.4) * len(patterns.taus) + 1.2
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(patterns.taus), sharex=True, squeeze=False)[:, 0]
    colours = matplotlib.colormaps["viridis"].with_extremes(under="0.85")
    for axes, tau, label, densities in zip(panels, patterns.taus, patterns.labels, patterns.densities(), strict=True):
        percent = 100 * densities
        bottom, top = np.nanmin(percent[percent > 0]), np.nanmax(percent)
        norm = LogNorm(vmin=min(bottom, top / 100), vmax=top)
        image = axes.imshow(np.maximum(percent, bottom / 100), norm=norm, cmap=colours, aspect="auto")
        axes.set_yticks(range(len(operations)), operations, fontsize=8)
        axes.set_title(f"{label} ({tau:,} weights)", fontsize=10)
        bar = figure.colorbar(image, ax=axes, extend="min", format="%g")
        bar.set_label("share of the tensor's weights, % (grey: none)", fontsize=8)
    label_columns(panels[-1], columns)
    return save_figure(figure, path)


def draw_losses(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> Path:
    """Training loss and held-out accuracy of several runs.

    Args:
        curves: label -> lines of ``metrics.jsonl``.
        path: the PNG file.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    metrics: dict[str, None] = {}
    for label, lines in curves.items():
        steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        name = next((name for line in lines for name in METRIC_LABELS if name in line), "top1")
        metrics.setdefault(METRIC_LABELS[name])
        tops = [(line["step"], 100 * line[name]) for line in lines if name in line]
        losses.plot(*zip(*steps, strict=True), label=label, linewidth=1)
        accuracies.plot(*zip(*tops, strict=True), label=label, marker="o")
    losses.set(xlabel="step", ylabel="training loss", yscale="log")
    accuracies.set(xlabel="step", ylabel=f"{' or '.join(metrics)} on held-out samples, %")
    accuracies.legend()
    return save_figure(figure, path)


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # Beside the axes there is room for any number of lines, and none is hidden.
    figure.legend(handles, labels, loc="outside right upper", title="most sensitive weights")
