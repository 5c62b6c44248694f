"""Reporting on what lies on disk: finished runs, scores, and plans."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.evaluation.scores import METRIC_LABELS
from spt_dist.files import write_text
from spt_dist.report.figures import draw_losses
from spt_dist.report.patterns import TAUS, Patterns
from spt_dist.report.plan_figures import draw_plan
from spt_dist.report.plans import PLAN_ENDINGS, read_plans, report_plans
from spt_dist.report.stage_one import report_scores
from spt_dist.report.suites import report_suites
from spt_dist.report.summaries import METHOD_LABELS, read_summary
from spt_dist.sensitivity.scores import INDEX_FILE, Scores
from spt_dist.tables import format_table
from spt_dist.training.metrics import read_metrics
from spt_dist.training.suite import SUITE_FILE


def report_on(paths: Sequence[Path], out: Path, taus: Sequence[int | float] = TAUS) -> tuple[str, dict[str, Path]]:
    """Write ``report.txt`` and pictures for work dirs of ``launch/train.py``, be they of runs or of suites, folders of
    scores, and plans.

    Args:
        paths: work dirs; folders of ``launch/sensitivity.py`` or ``Scores.save``; and files as ``plans.read_plans``
            takes them. Tables have them in this order.
        out: folder for the results.
        taus: numbers of most sensitive weights whose patterns are drawn, see ``patterns.resolve_taus``.

    Returns:
        The tables (of the suites, of the runs, for each folder of scores of its patterns, and of the plans), and what
        lies where: description -> path.

    Raises:
        UserError: a folder holds neither a finished run nor scores; two have the same name; as ``resolve_taus`` and
            ``plans.read_plans`` and ``report_suites``.
    """
    plan_files = [path for path in paths if path.suffix in PLAN_ENDINGS]
    folders = [path for path in paths if path not in plan_files]
    _check_names(folders)
    plans = read_plans(plan_files) if plan_files else {}
    suites = [folder for folder in folders if (folder / SUITE_FILE).is_file()]
    folders = [folder for folder in folders if folder not in suites]
    work_dirs = [folder for folder in folders if not (folder / INDEX_FILE).is_file()]
    runs = {work_dir: read_summary(work_dir) for work_dir in work_dirs}
    tables: list[str] = []
    files: dict[str, Path] = {}
    if suites:
        table, files = report_suites(suites, out)
        tables.append(table)
    if runs:
        tables.append(_tabulate(runs))
        curves = {_label(summary, folder): read_metrics(folder / "metrics.jsonl") for folder, summary in runs.items()}
        files["picture of losses"] = draw_losses(curves, out / "losses.png")
    for folder in folders:
        if folder in runs:
            files |= _report_run(folder, out, taus)
        else:
            patterns, more = _report_scores(folder, folder, out, taus)
            tables.append(f"{folder.absolute().name}: {patterns.table()}")
            files |= more
    if plans:
        table, more = report_plans(plans, out)
        tables.append(table)
        files |= more
    text = "\n\n".join(tables)
    return text, {"table": write_text(out / "report.txt", text + "\n"), **files}


def _tabulate(runs: Mapping[Path, dict[str, Any]]) -> str:
    rows = [
        [
            _label(summary, work_dir),
            f"{summary['num_trainable']:,}",
            f"{summary['num_trainable'] / summary['backbone_size']:.2%}",
            f"{summary['num_head']:,}",
            f"{100 * summary['scores'][summary['metric']]:.2f}",
            f"{summary['seconds_scoring']:.0f} + {summary['seconds_training']:.0f}",
        ]
        for work_dir, summary in runs.items()
    ]
    metrics = dict.fromkeys(METRIC_LABELS.get(summary["metric"], summary["metric"]) for summary in runs.values())
    columns = ["method", "trainable", "of backbone", "head", f"{' or '.join(metrics)} %", "seconds (stage 1 + 2)"]
    return format_table("held-out samples; trainable parameters without the head", columns, rows)


def _report_run(work_dir: Path, out: Path, taus: Sequence[int | float]) -> dict[str, Path]:
    """Pictures of the scores and the plan of one run, and where its task file and merged checkpoint are."""
    if not (work_dir / "scores" / INDEX_FILE).is_file():
        return {}
    name = work_dir.absolute().name
    _, files = _report_scores(work_dir / "scores", work_dir, out, taus)
    plan = Plan.load(work_dir / "plan.safetensors")
    files[f"picture of allocation ({name})"] = draw_plan(plan, out / f"allocation_{name}.png")
    for kind in ("task", "merged"):
        if (work_dir / f"{kind}.safetensors").is_file():
            files[f"{kind} file ({name})"] = work_dir / f"{kind}.safetensors"
    return files


def _report_scores(
    directory: Path, owner: Path, out: Path, taus: Sequence[int | float]
) -> tuple[Patterns, dict[str, Path]]:
    """Report on the scores in ``directory`` under the name of the folder ``owner``."""
    name = owner.absolute().name
    patterns, files = report_scores(Scores.load(directory), out, taus, suffix=f"_{name}")
    return patterns, {f"{what} ({name})": path for what, path in files.items()}


def _check_names(folders: Sequence[Path]) -> None:
    """Refuse folders whose pictures would overwrite each other."""
    names: dict[str, Path] = {}
    for folder in folders:
        name = folder.absolute().name
        if name in names:
            raise UserError(f"{names[name]} and {folder}: their pictures would have the same names; take one at a time")
        names[name] = folder


def _label(summary: dict[str, Any], work_dir: Path) -> str:
    return f"{METHOD_LABELS.get(summary['method'], summary['method'])} ({work_dir.absolute().name})"
