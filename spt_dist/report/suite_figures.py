"""The picture of a suite: what each method reaches on each task."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from spt_dist.report.canvas import save_figure

MARKERS = "osD^vPX*<>"


def draw_suite(
    groups: Mapping[str, Sequence[str]], methods: Sequence[tuple[str, Mapping[str, float]]], what: str, path: Path
) -> Path:
    """Draw a point for each method and task, the tasks group by group.

    Args:
        groups: name -> names of its tasks.
        methods: label, and percent of each task that is known.
        what: the metric.
        path: of the picture.
    """
    tasks = [task for named in groups.values() for task in named]
    places = {task: place for place, task in enumerate(reversed(tasks))}
    figure = Figure(figsize=(9.0, 1.8 + 0.28 * len(tasks) + 0.2 * len(methods)), layout="constrained")
    axes = figure.subplots()
    # What is only told by its mean has no points.
    for number, (label, values) in enumerate(item for item in methods if item[1]):
        shown = [task for task in tasks if task in values]
        axes.plot(
            [values[task] for task in shown],
            [places[task] for task in shown],
            MARKERS[number % len(MARKERS)],
            label=label,
            alpha=0.8,
        )
    for group, named in list(groups.items()):
        highest = places[named[0]]
        if highest < len(tasks) - 1:
            axes.axhline(highest + 0.5, color="0.6", linewidth=0.8)
        axes.text(1.01, highest, group, transform=axes.get_yaxis_transform(), va="center", color="0.35")
    axes.set_yticks(list(places.values()), list(places))
    axes.set_xlabel(f"{what} on held-out samples, %")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", fontsize="small")
    return save_figure(figure, path)
