"""Run stage 1 only: save the scores of every weight, report where the most sensitive weights lie, by block and by
operation, and save plans for any number of budgets."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from _cli import add_config_options, add_data_options, describe, make_parser, read_config, run
from spt_dist.data.tasks import build_task
from spt_dist.models.matrices import take_inventory
from spt_dist.parallel.launch import process_group
from spt_dist.report.patterns import TAUS, parse_taus, resolve_taus
from spt_dist.report.plans import tabulate_plans
from spt_dist.report.runs import report_on
from spt_dist.report.stage_one import report_scores
from spt_dist.training.pipeline import check_config, check_setup
from spt_dist.training.scoring import build_scored_model, score
from spt_dist.training.sweep import allocate_budgets, check_sweep, parse_budgets, save_plans

EXAMPLE = """\
torchrun --nproc_per_node 2 launch/sensitivity.py configs/quickstart/digits_spt_lora.py --out scores/digits
  python launch/sensitivity.py configs/quickstart/digits_spt_lora.py --out scores/digits --budget 0.01 --budget 9216 \\
      --cfg-options sensitivity.scores=scores/digits"""


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    add_config_options(parser)
    add_data_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the scores and the report")
    parser.add_argument(
        "--tau",
        action="append",
        metavar="N",
        help="report on the N most sensitive weights: a count (1000) or a fraction (0.01); may be given several times "
        f"(default: {', '.join(map(str, TAUS))})",
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="N",
        help="save the plan of a budget, allocated as the config's method says: trainable parameters without the head, "
        "a count (400000) or a fraction of the backbone (0.004); may be given several times",
    )
    arguments = parser.parse_args()
    taus, budgets = parse_taus(arguments.tau), parse_budgets(arguments.budget)
    config = read_config(arguments)
    with process_group(config.engine.timeout) as group:
        check_config(config)
        task = build_task(config.data, config.model.num_classes, config.model.normalize)
        check_setup(arguments.out, task, config)
        model = build_scored_model(config).model
        resolve_taus(taus, take_inventory(model).backbone_size)
        if budgets:
            check_sweep(config, model, budgets)
        scores = score(config, model, task, group.watch.report)
        saved = config.sensitivity.scores or arguments.out
        if config.sensitivity.scores is None:
            scores.save(saved)
        patterns, files = report_scores(scores, arguments.out, taus)
        plans = allocate_budgets(scores, config, budgets)
        plan_files = save_plans(plans, arguments.out / "plans")
        if dist.get_rank() == 0:
            print(patterns.table())
            if plans:
                print(f"\n{tabulate_plans(plans)}")
            describe(
                {
                    "samples": scores.num_samples,
                    "normalised as": str(task.normalisation or "data.type says"),
                    "scored weights": f"{scores.shard.index.total:,}",
                    "scores": f"{saved}/scores.json",
                    **files,
                    "to use them": f"launch/train.py {arguments.config} --cfg-options sensitivity.scores={saved}",
                }
                | _report_on_plans(plan_files, arguments.config)
            )


def _report_on_plans(plan_files: dict[str, Path], config: str) -> dict[str, Any]:
    """What ``launch/report.py`` makes of the plans, and how to use one: description -> path or command."""
    if not plan_files:
        return {}
    *_, last = plan_files.values()
    _, report = report_on([*plan_files.values()], last.parent)
    options = f"method._delete_=True method.type=plan method.path={last}"
    return {**plan_files, **report, "to use a plan": f"launch/train.py {config} --cfg-options {options}"}


if __name__ == "__main__":
    run(main)
