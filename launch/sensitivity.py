"""Run stage 1 only: save the scores of every weight, for any number of budgets later, and report where the most
sensitive weights lie, by block and by operation."""

from pathlib import Path

import torch.distributed as dist

from _cli import add_config_options, describe, make_parser, read_config, run
from spt_dist.data.tasks import build_task
from spt_dist.models.matrices import take_inventory
from spt_dist.parallel.launch import process_group
from spt_dist.report.patterns import TAUS, parse_taus, resolve_taus
from spt_dist.report.stage_one import report_scores
from spt_dist.training.pipeline import build_model, check_config, check_setup, score

EXAMPLE = "torchrun --nproc_per_node 2 launch/sensitivity.py configs/quickstart/digits_spt_lora.py --out scores/digits"


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    add_config_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the scores and the report")
    parser.add_argument(
        "--tau",
        action="append",
        metavar="N",
        help="report on the N most sensitive weights: a count (1000) or a fraction (0.01); may be given several times "
        f"(default: {', '.join(map(str, TAUS))})",
    )
    arguments = parser.parse_args()
    taus = parse_taus(arguments.tau)
    config = read_config(arguments)
    with process_group():
        check_config(config)
        task = build_task(config.data, config.model.num_classes)
        model = build_model(config)
        check_setup(Path(arguments.out), task, model)
        resolve_taus(taus, take_inventory(model).backbone_size)
        scores = score(config, model, task)
        scores.save(arguments.out)
        patterns, files = report_scores(scores, arguments.out, taus)
        if dist.get_rank() == 0:
            print(patterns.table())
            describe(
                {
                    "samples": scores.num_samples,
                    "scored weights": f"{scores.shard.index.total:,}",
                    "scores": f"{arguments.out}/scores.json",
                    **files,
                    "to use them": f"launch/train.py CONFIG --cfg-options sensitivity.scores={arguments.out}",
                }
            )


if __name__ == "__main__":
    run(main)
