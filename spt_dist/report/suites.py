"""The table of a suite: every task, the groups' means, and the two means over tasks that are in circulation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spt_dist.config import lookup
from spt_dist.errors import UserError
from spt_dist.evaluation.scores import METRIC_LABELS
from spt_dist.files import write_text
from spt_dist.report.published import PUBLISHED, PUBLISHED_TASKS, Published
from spt_dist.report.suite_figures import draw_suite
from spt_dist.report.summaries import METHOD_LABELS, read_summary
from spt_dist.tables import format_table
from spt_dist.training.record import read_recorded
from spt_dist.training.suite import SUITE_FILE

UNKNOWN = "-"
# Sections of a config that a suite's members are expected to have in common.
COMPARED = ("method", "train", "sensitivity", "seed")


@dataclass(frozen=True)
class Column:
    """What one method reaches, ours or a published one.

    Attributes:
        label: heading.
        tasks: top-1 or mIoU of a task in percent; unfinished or unknown ones are missing.
        note: the mean that a paper prints, in percent; ``None`` for none.
        num_trainable: mean over the tasks that are there; ``None`` for a published method.
    """

    label: str
    tasks: Mapping[str, float]
    note: float | None = None
    num_trainable: float | None = None


def report_suites(folders: Sequence[Path], out: Path) -> tuple[str, dict[str, Path]]:
    """Write ``suite.txt`` and ``suite.png`` for suites of the same tasks, with published values beside them.

    Args:
        folders: work dirs of suites, finished or not.
        out: folder for the results.

    Returns:
        The table, and what lies where: description -> path.

    Raises:
        UserError: a suite's file is damaged; the suites have not the same tasks; no task is finished.
    """
    suites = [_read_suite(folder) for folder in folders]
    groups: dict[str, list[str]] = suites[0]["groups"]
    for folder, suite in zip(folders, suites, strict=True):
        if suite["groups"] != groups:
            raise UserError(f"{folder}: has other tasks than {folders[0]}; report on one kind of suite at a time")
    columns: list[Column] = []
    metrics: set[str] = set()
    for folder, suite in zip(folders, suites, strict=True):
        found = _read_members(folder, groups)
        metrics |= {summary["metric"] for summary in found.values()}
        columns.append(_own_column(folder, found))
        methods = {summary["method"] for summary in found.values()}
        columns += _published_columns(suite["published"], methods, groups)
    columns = list({column.label: column for column in columns}.values())
    what = " or ".join(sorted(METRIC_LABELS.get(metric, metric) for metric in metrics))
    table = tabulate(groups, columns, f"{what} on held-out samples, in percent")
    for folder in folders:
        table += _differences(folder, groups)
    files = {
        "table": write_text(out / "suite.txt", table + "\n"),
        "picture": draw_suite(groups, [(column.label, column.tasks) for column in columns], what, out / "suite.png"),
    }
    return table, files


def tabulate(groups: Mapping[str, Sequence[str]], columns: Sequence[Column], title: str) -> str:
    """The table: tasks by group, then the means. A mean of which a task is missing is not given.

    Args:
        groups: name -> names of its tasks.
        columns: one a method.
        title: the line above.
    """
    rows: list[list[str]] = []
    for group, tasks in groups.items():
        rows.append([group, *[""] * len(columns)])
        rows += [[f"  {task}", *(_percent(column.tasks.get(task)) for column in columns)] for task in tasks]
        rows.append(["  mean of the group", *(_percent(mean_of(column.tasks, tasks)) for column in columns)])
    every = [task for tasks in groups.values() for task in tasks]
    if len(groups) > 1:
        rows.append(
            [
                f"group mean: mean of the {len(groups)} groups' means",
                *(_percent(group_mean(column.tasks, groups)) for column in columns),
            ]
        )
    rows.append(
        [f"task mean: mean of the {len(every)} tasks", *(_percent(mean_of(column.tasks, every)) for column in columns)]
    )
    if any(column.note is not None for column in columns):
        kind = "group mean" if len(groups) > 1 else "mean"
        rows.append([f"{kind} as the paper prints it", *(_percent(column.note) for column in columns)])
    rows.append(
        [
            "trainable parameters, head not counted (mean)",
            *(UNKNOWN if column.num_trainable is None else f"{column.num_trainable:,.0f}" for column in columns),
        ]
    )
    return format_table(title, ["", *(column.label for column in columns)], rows)


def mean_of(values: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    """Mean over ``tasks``; ``None`` if one is missing."""
    found = [values[task] for task in tasks if task in values]
    return sum(found) / len(found) if len(found) == len(tasks) else None


def group_mean(values: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> float | None:
    """Mean of the groups' means, which is what VTAB's papers mostly give; ``None`` if a task is missing."""
    means = [mean_of(values, tasks) for tasks in groups.values()]
    known = [mean for mean in means if mean is not None]
    return sum(known) / len(known) if len(known) == len(means) else None


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1f}"


def _own_column(folder: Path, found: Mapping[str, dict[str, Any]]) -> Column:
    methods = dict.fromkeys(METHOD_LABELS.get(summary["method"], summary["method"]) for summary in found.values())
    trained = [summary["num_trainable"] for summary in found.values()]
    return Column(
        label=f"{', '.join(methods)} ({folder.absolute().name})",
        tasks={name: 100 * summary["scores"][summary["metric"]] for name, summary in found.items()},
        num_trainable=sum(trained) / len(trained),
    )


def _published_columns(table: str, methods: set[str], groups: Mapping[str, Sequence[str]]) -> list[Column]:
    """All rows that a published table has for these methods; their means only where the suite has all of its tasks."""
    if not table:
        return []
    rows: dict[str, tuple[Published, ...]] = lookup("suite.published", table, PUBLISHED)
    is_whole = sorted(PUBLISHED_TASKS[table]) == sorted(task for tasks in groups.values() for task in tasks)
    found = [row for method, of_method in rows.items() if method in methods for row in of_method]
    return [Column(f"paper: {row.label}", row.tasks, row.mean if is_whole else None) for row in found]


def _differences(folder: Path, groups: Mapping[str, Sequence[str]]) -> str:
    """A line on what a suite's finished members were not trained alike in; "" where there is nothing."""
    values: dict[str, set[str]] = {}
    for name in (name for tasks in groups.values() for name in tasks):
        config = read_recorded(folder / name)
        for section in COMPARED if config is not None else ():
            content = config[section] if isinstance(config[section], dict) else {"": config[section]}
            for key, value in content.items():
                values.setdefault(f"{section}.{key}".rstrip("."), set()).add(json.dumps(value))
    found = [f"{key} ({', '.join(sorted(seen))})" for key, seen in values.items() if len(seen) > 1]
    return f"\nnote: the tasks of {folder} were not trained alike: {'; '.join(found)}" if found else ""


def _read_suite(folder: Path) -> dict[str, Any]:
    path = folder / SUITE_FILE
    try:
        suite: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable ({error})") from error
    return suite


def _read_members(folder: Path, groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Summaries of the finished members."""
    names = [name for tasks in groups.values() for name in tasks]
    found = {name: read_summary(folder / name) for name in names if (folder / name / "summary.json").is_file()}
    if not found:
        raise UserError(f"{folder}: none of the suite's tasks is finished")
    return found
