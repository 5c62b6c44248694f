"""Pictures of plans: what one of them trains, and how several share out what they train."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from spt_dist.allocation.plan import Plan
from spt_dist.report.canvas import describe_columns, label_grid, new_figure, save_figure
from spt_dist.report.grid import Array
from spt_dist.report.order import lay_out_some
from spt_dist.report.parts import IN_PLACE, SINGLE, VECTORS, cost_by_way, kinds_of, take_apart

_KIND_COLOURS = {"lora": "tab:blue", "adapter": "tab:green", "prompt": "tab:purple"}
_MORE_KIND_COLOURS = ("tab:red", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
_WAY_COLOURS = {VECTORS: "#a8ddd0", SINGLE: "#fd9243", IN_PLACE: "0.8"}
_COLUMNS_OF_LEGEND = 6
_SHADES = matplotlib.colormaps["Oranges"]
_SHADES_OF_COUNTS = LogNorm(0.3, 1e5)


def draw_plan(plan: Plan, path: str | Path) -> Path:
    """What is trained in each block's operations, and how.

    Args:
        plan: the plan.
        path: the PNG file.

    Raises:
        UserError: a kind of module is not registered.
    """
    parts = take_apart(plan)
    layout = lay_out_some([part.name for part in parts])
    figure, axes = new_figure(len(layout.columns) + _COLUMNS_OF_LEGEND, len(layout.operations))
    colours = _choose_colours(kinds_of([plan]))
    for part, row, column in zip(parts, layout.rows, layout.cols, strict=True):
        shade = float(_SHADES_OF_COUNTS(part.cost))
        colour = to_hex(_SHADES(shade)) if part.way == SINGLE else colours[part.way]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
        is_module = part.way not in _WAY_COLOURS
        text = f"r{plan.rank}" if is_module else _shorten(part.cost)
        text_colour = "white" if is_module or (part.way == SINGLE and shade > 0.7) else "black"
        axes.text(column, row, text, ha="center", va="center", color=text_colour, fontsize=7)
    if parts:
        label_grid(axes, layout.operations, layout.columns)
        axes.set(xlim=(-0.5, len(layout.columns) - 0.5), ylim=(len(layout.operations) - 0.5, -0.5))
        ways = [way for way in colours if any(part.way == way for part in parts)]
        handles = [Patch(color=colours[way], label=_describe_way(plan, way)) for way in ways]
        figure.legend(handles=handles, loc="outside right upper", title="how it is trained", alignment="left")
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "only the head is trained", ha="center", va="center", transform=axes.transAxes)
    share = f"{plan.num_trainable / plan.backbone_size:.3%} of the backbone, " if plan.backbone_size else ""
    axes.set_title(f"{plan.method}: {plan.num_trainable:,} trainable parameters\n{share}head not counted", fontsize=10)
    return save_figure(figure, path)


def draw_plans(plans: Mapping[str, Plan], path: str | Path) -> Path:
    """How several plans share out what they train: over ways of training, over blocks, and over operations.

    Args:
        plans: name -> plan; they stand in the order of their trainable parameters.
        path: the PNG file.

    Raises:
        UserError: a kind of module is not registered.
    """
    plans = dict(sorted(plans.items(), key=lambda item: item[1].num_trainable))
    names = list(dict.fromkeys(part.name for plan in plans.values() for part in take_apart(plan)))
    layout = lay_out_some(names)
    rows, columns = (dict(zip(names, places, strict=True)) for places in (layout.rows, layout.cols))
    by_operation = _share_out(plans, rows, len(layout.operations))
    by_block = _share_out(plans, columns, len(layout.columns))
    num_rows = max(len(layout.operations), len(layout.columns), 12)
    figure = Figure(figsize=(3 * (0.55 * len(plans) + 1.2) + 5.0, 0.22 * num_rows + 2.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_ways(left, plans)
    _draw_shares(middle, by_block, layout.columns)
    middle.set(title="by block", ylabel=describe_columns(layout.columns))
    _draw_shares(right, by_operation, layout.operations)
    right.set(title="by operation")
    labels = [f"{name}\n{plan.num_trainable:,}" for name, plan in plans.items()]
    for axes in (left, middle, right):
        axes.set_xticks(range(len(plans)), labels, rotation=90, fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", title="how it is trained")
    figure.suptitle("where each plan's trainable parameters are, % of them (their number under the plan's name)")
    return save_figure(figure, path)


def _describe_way(plan: Plan, way: str) -> str:
    """What the legend says about a way of training."""
    number, cost = [*plan.matrices.values()].count(way), cost_by_way(plan)[way]
    modules = f" (r{plan.rank}): {number} module{'s' * (number > 1)}," if number else ":"
    return f"{way}{modules}\n{cost:,} parameters"


def _draw_ways(axes: Axes, plans: Mapping[str, Plan]) -> None:
    """One bar a plan, made up of what its ways of training have of its trainable parameters."""
    colours = _choose_colours(kinds_of(plans.values()))
    costs = [cost_by_way(plan) for plan in plans.values()]
    bottoms = np.zeros(len(plans))
    for way, colour in colours.items():
        shares = np.array([100 * cost[way] / max(cost.total(), 1) for cost in costs])
        if shares.any():
            bars = axes.bar(range(len(plans)), shares, bottom=bottoms, color=colour, label=way)
            labels = [f"{share:.1f}" if share >= 3 else "" for share in shares]
            text_colour = "black" if way in _WAY_COLOURS else "white"
            axes.bar_label(bars, labels, label_type="center", color=text_colour, fontsize=7)
            bottoms += shares
    axes.set(xlim=(-0.6, len(plans) - 0.4), ylim=(0, 100), ylabel="share of the trainable parameters, %")
    axes.set_title("by way of training")


def _share_out(plans: Mapping[str, Plan], places: Mapping[str, int], num_places: int) -> Array:
    """Percent of each plan's trainable parameters in each row of a grid, ``(num_places, num_plans)``."""
    shares = np.zeros((num_places, len(plans)))
    for number, plan in enumerate(plans.values()):
        for part in take_apart(plan):
            shares[places[part.name], number] += 100 * part.cost / plan.num_trainable
    return shares


def _draw_shares(axes: Axes, shares: Array, rows: Sequence[str]) -> None:
    # Small shares differ too: without the root one large share makes all others pale.
    shades = PowerNorm(0.5, 0, shares.max(initial=1))
    axes.imshow(np.where(shares > 0, shares, np.nan), norm=shades, cmap="Blues", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            text = f"{share:.1f}" if share >= 0.05 else "<0.1"
            colour = "white" if shades(share) > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)


def _choose_colours(kinds: Sequence[str]) -> dict[str, str]:
    """Way of training -> colour; every kind of module has its own."""
    own = [kind for kind in kinds if kind not in _KIND_COLOURS]
    more = {kind: _MORE_KIND_COLOURS[place % len(_MORE_KIND_COLOURS)] for place, kind in enumerate(own)}
    known = {kind: colour for kind, colour in _KIND_COLOURS.items() if kind in kinds}
    return known | more | _WAY_COLOURS


def _shorten(count: int) -> str:
    """A number that fits into a cell: 94208, 590k, 1.8M."""
    if count < 100_000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"
