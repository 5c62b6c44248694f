"""The table of a suite."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from spt_dist import UserError
from spt_dist.report.published import PUBLISHED, PUBLISHED_TASKS
from spt_dist.report.runs import report_on
from spt_dist.report.suites import group_mean, mean_of
from spt_dist.report.summaries import METHOD_LABELS

GROUPS = {"natural": ["cifar", "dtd", "svhn"], "structured": ["clevr_count"]}
TOP1 = {"cifar": 0.7, "dtd": 0.6, "svhn": 0.2, "clevr_count": 0.9}


def write_suite(
    folder: Path, method: str = "spt-lora", shift: float = 0.0, finished: tuple[str, ...] = tuple(TOP1)
) -> Path:
    folder.mkdir()
    (folder / "suite.json").write_text(json.dumps({"path": "all.py", "groups": GROUPS, "published": "vtab"}))
    for number, name in enumerate(finished):
        (folder / name).mkdir()
        summary = {
            "method": method,
            "num_trainable": 1000 * number,
            "metric": "top1",
            "scores": {"top1": TOP1[name] + shift},
        }
        (folder / name / "summary.json").write_text(json.dumps(summary))
    return folder


def cells(text: str, start: str) -> list[str]:
    """Numbers of the row that begins with ``start``."""
    (row,) = [line for line in text.splitlines() if line.strip("│ ").startswith(start)]
    return [cell.strip() for cell in row.strip("│").split("│")[1:]]


def test_both_means_of_vtab_are_given_and_named(tmp_path: Path) -> None:
    text, files = report_on([write_suite(tmp_path / "ours")], tmp_path / "out")
    # By hand: (70 + 60 + 20) / 3 = 50 and 90; the mean of these is 70, but that of the tasks is 60.
    assert cells(text, "group mean: mean of the 2 groups' means")[0] == "70.0"
    assert cells(text, "task mean: mean of the 4 tasks")[0] == "60.0"
    # Both of the paper's rows of the method; the first is known by its mean alone.
    assert cells(text, "cifar") == ["70.0", "-", "73.5"]
    assert "as the paper prints it" not in text, "the paper's mean is over all 19 tasks"
    assert cells(text, "trainable parameters")[0] == "1,500"
    assert "SPT-LoRA (ours)" in text
    assert "paper: SPT-LoRA, 0.31 %" in text
    assert "paper: SPT-LoRA, 0.63 %" in text
    assert (tmp_path / "out" / "suite.txt").read_text().strip() in text
    assert imread(files["picture"]).shape[2] in (3, 4)


def test_no_mean_is_given_while_a_task_is_missing(tmp_path: Path) -> None:
    text, _ = report_on([write_suite(tmp_path / "ours", finished=("cifar", "dtd", "clevr_count"))], tmp_path / "out")
    assert cells(text, "svhn")[0] == "-"
    means = [line for line in text.splitlines() if "mean of the group" in line]
    assert [line.split("│")[2].strip() for line in means] == ["-", "90.0"]
    assert cells(text, "group mean: ")[0] == cells(text, "task mean: ")[0] == "-"


def test_suites_are_compared(tmp_path: Path) -> None:
    folders = [write_suite(tmp_path / "spt"), write_suite(tmp_path / "lora", "lora", -0.1)]
    text, _ = report_on(folders, tmp_path / "out")
    assert cells(text, "cifar") == ["70.0", "-", "73.5", "60.0", "-", "68.1"]


def test_suites_of_other_tasks_and_empty_ones_are_refused(tmp_path: Path) -> None:
    first, other = write_suite(tmp_path / "first"), write_suite(tmp_path / "other")
    (other / "suite.json").write_text(json.dumps({"path": "x", "groups": {"natural": ["cifar"]}, "published": ""}))
    with pytest.raises(UserError, match="other: has other tasks than"):
        report_on([first, other], tmp_path / "out")
    with pytest.raises(UserError, match="none of the suite's tasks is finished"):
        report_on([write_suite(tmp_path / "empty", finished=())], tmp_path / "out")


def test_the_paper_s_full_fine_tuning_has_the_means_that_are_told_of_it() -> None:
    """69.0 is the mean of the groups, 65.57 that of the tasks: two numbers in circulation for one row."""
    full = PUBLISHED["vtab"]["full"][0].tasks
    names = list(full)
    groups = {"natural": names[:7], "specialized": names[7:11], "structured": names[11:]}
    assert len(names) == 19
    mean, task_mean = group_mean(full, groups), mean_of(full, names)
    assert mean is not None
    assert task_mean is not None
    assert round(mean, 2) == 68.97
    assert round(task_mean, 2) == 65.57


def test_the_paper_s_mean_stands_beside_all_of_its_tasks_alone(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "ours", finished=("cifar",))
    groups = {"all": list(PUBLISHED_TASKS["vtab"])}
    (folder / "suite.json").write_text(json.dumps({"path": "all.py", "groups": groups, "published": "vtab"}))
    text, _ = report_on([folder], tmp_path / "out")
    assert cells(text, "mean as the paper prints it") == ["-", "75.9", "76.4"]


def test_suites_of_several_backbones_keep_their_published_rows_apart(tmp_path: Path) -> None:
    """They have the same tasks and methods, and other values."""
    folders = [write_suite(tmp_path / "supervised", "lora"), write_suite(tmp_path / "mae", "lora")]
    for folder, table in zip(folders, ("vtab", "vtab_mae"), strict=True):
        groups = {"all": list(PUBLISHED_TASKS[table])}
        (folder / "suite.json").write_text(json.dumps({"path": "all.py", "groups": groups, "published": table}))
    text, _ = report_on(folders, tmp_path / "out")
    assert cells(text, "mean as the paper prints it") == ["-", "74.9", "75.0", "-", "64.3", "64.8"]


def test_labels_of_published_rows_are_their_own() -> None:
    """Columns of a table are told apart by them, except VTAB's and FGVC's, which are never in one."""
    vtab = [row.label for name, table in PUBLISHED.items() if name != "fgvc" for rows in table.values() for row in rows]
    assert len(set(vtab)) == len(vtab)
    assert set(PUBLISHED) == set(PUBLISHED_TASKS)
    assert {method for table in PUBLISHED.values() for method in table} <= set(METHOD_LABELS)


def test_tasks_that_were_not_trained_alike_are_told(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "ours")
    for number, name in enumerate(TOP1):
        config = {
            "method": {"type": "spt", "budget": 900},
            "train": {"epochs": 1 + number % 2},
            "sensitivity": {},
            "seed": 0,
        }
        (folder / name / "run.json").write_text(json.dumps({"config": config}))
    text, _ = report_on([folder], tmp_path / "out")
    assert text.splitlines()[-1] == f"note: the tasks of {folder} were not trained alike: train.epochs (1, 2)"
    assert "not trained alike" not in report_on([write_suite(tmp_path / "other")], tmp_path / "out")[0]
