"""What all pictures share: their size, their labels, and how they are saved."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spt_dist.files import write_atomically


def new_figure(num_columns: int, num_rows: int) -> tuple[Figure, Axes]:
    """A figure with one grid of so many cells, large enough to write a number into each."""
    figure = Figure(figsize=(max(7.0, 0.5 * num_columns + 3.5), max(3.0, 0.3 * num_rows + 1.2)), layout="constrained")
    return figure, figure.subplots()


def label_grid(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Name the rows and columns of a grid of operations and blocks."""
    axes.set_yticks(range(len(rows)), rows)
    label_columns(axes, columns)


def label_columns(axes: Axes, columns: Sequence[str]) -> None:
    """Name the columns of a grid of blocks, see ``grid.Layout``."""
    axes.set_xticks(range(len(columns)), columns)
    for label, column in zip(axes.get_xticklabels(), columns, strict=True):
        label.set_rotation(90 if len(column) > 2 else 0)
    axes.set_xlabel(describe_columns(columns))


def describe_columns(columns: Sequence[str]) -> str:
    """What the names of blocks mean, for the axis that has them."""
    block = "stage.block" if any("." in column for column in columns) else "block"
    return f"{block}; what lies outside the blocks by name"


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure in the format of the path's ending and return the path."""
    path = Path(path)
    # No interactive backend is wanted, or even there, on a cluster's nodes.
    matplotlib.use("agg")
    return write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format=path.suffix[1:]))
