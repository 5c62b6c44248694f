"""Run stage 1 only: score every weight and save the scores, for any number of budgets later."""

import torch.distributed as dist

from _cli import add_config_options, describe, make_parser, read_config, run
from spt_dist.data.tasks import build_task
from spt_dist.parallel.launch import process_group
from spt_dist.report.figures import draw_scores
from spt_dist.training.pipeline import build_model, check_config, score

EXAMPLE = "torchrun --nproc_per_node 2 launch/sensitivity.py configs/quickstart/digits_spt_lora.py --out scores/digits"


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    add_config_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the scores and their picture")
    arguments = parser.parse_args()
    config = read_config(arguments)
    with process_group():
        check_config(config)
        task = build_task(config.data, config.model.num_classes)
        scores = score(config, build_model(config), task)
        scores.save(arguments.out)
        means = {name: float(scores[name].mean()) for name in scores.names}
        if dist.get_rank() == 0:
            picture = draw_scores(means, f"{arguments.out}/scores.png")
            describe(
                {
                    "samples": scores.num_samples,
                    "scored weights": f"{scores.shard.index.total:,}",
                    "scores": f"{arguments.out}/scores.json",
                    "picture": picture,
                    "to use them": f"launch/train.py CONFIG --cfg-options sensitivity.scores={arguments.out}",
                }
            )


if __name__ == "__main__":
    run(main)
