"""Comparing finished runs."""

import json
from pathlib import Path
from typing import Any

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.files import write_text
from spt_dist.report.figures import draw_losses, draw_plan, draw_scores
from spt_dist.sensitivity.scores import INDEX_FILE, Scores
from spt_dist.tables import format_table
from spt_dist.training.metrics import read_metrics

METHOD_LABELS = {
    "linear": "linear probe",
    "lora": "LoRA",
    "spt-lora": "SPT-LoRA",
    "spt": "SPT",
    "full": "full fine-tuning",
}


def compare_runs(work_dirs: list[Path], out: Path) -> tuple[str, dict[str, Any]]:
    """Write ``report.txt`` and pictures for some work dirs of ``launch/train.py``.

    Args:
        work_dirs: one for each run, in the order of the table.
        out: folder for the results.

    Returns:
        The table, and what lies where: description -> path.

    Raises:
        UserError: a folder holds no finished run.
    """
    runs = {work_dir: _read_summary(work_dir) for work_dir in work_dirs}
    rows = [
        [
            _label(summary, work_dir),
            f"{summary['num_trainable']:,}",
            f"{summary['num_trainable'] / summary['backbone_size']:.2%}",
            f"{summary['num_head']:,}",
            f"{100 * summary['top1']:.2f}",
            f"{summary['seconds_scoring']:.0f} + {summary['seconds_training']:.0f}",
        ]
        for work_dir, summary in runs.items()
    ]
    columns = ["method", "trainable", "of backbone", "head", "top-1 %", "seconds (stage 1 + 2)"]
    table = format_table("held-out accuracy; trainable parameters without the head", columns, rows)
    files: dict[str, Any] = {"table": write_text(out / "report.txt", table + "\n")}
    curves = {_label(summary, work_dir): read_metrics(work_dir / "metrics.jsonl") for work_dir, summary in runs.items()}
    files["picture of losses"] = draw_losses(curves, out / "losses.png")
    for work_dir in runs:
        files |= _draw_stage_one(work_dir, out)
    return table, files


def _draw_stage_one(work_dir: Path, out: Path) -> dict[str, Any]:
    """Pictures of the scores and the plan of one run, and where its task file and merged checkpoint are."""
    files: dict[str, Any] = {}
    if not (work_dir / "scores" / INDEX_FILE).is_file():
        return files
    scores = Scores.load(work_dir / "scores")
    means = {name: float(scores[name].mean()) for name in scores.names}
    files[f"picture of scores ({work_dir.name})"] = draw_scores(means, out / f"scores_{work_dir.name}.png")
    plan = Plan.load(work_dir / "plan.safetensors")
    files[f"picture of allocation ({work_dir.name})"] = draw_plan(plan, out / f"allocation_{work_dir.name}.png")
    for name in ("task", "merged"):
        if (work_dir / f"{name}.safetensors").is_file():
            files[f"{name} file ({work_dir.name})"] = work_dir / f"{name}.safetensors"
    return files


def _label(summary: dict[str, Any], work_dir: Path) -> str:
    return f"{METHOD_LABELS.get(summary['method'], summary['method'])} ({work_dir.name})"


def _read_summary(work_dir: Path) -> dict[str, Any]:
    path = work_dir / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {work_dir} holds no finished run of launch/train.py") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not readable ({error})") from error
    return summary
