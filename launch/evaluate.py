"""Accuracy of a task file or a merged checkpoint on the held-out samples of its task."""

import torch.distributed as dist

from _cli import add_config_options, describe, make_parser, read_config, run
from spt_dist import load_delta
from spt_dist.data.tasks import build_task
from spt_dist.evaluation.classification import evaluate_top1
from spt_dist.models.checkpoints import load_merged
from spt_dist.parallel.launch import local_device, process_group
from spt_dist.training.scoring import build_model

EXAMPLE = (
    "python launch/evaluate.py configs/quickstart/digits_spt_lora.py --task work_dirs/digits_spt_lora/task.safetensors"
)


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    add_config_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", metavar="FILE", help="task file written by launch/train.py")
    source.add_argument("--merged", metavar="FILE", help="checkpoint written by launch/merge.py")
    arguments = parser.parse_args()
    config = read_config(arguments)
    with process_group(config.engine.timeout):
        task = build_task(config.data, config.model.num_classes)
        model = build_model(config)
        if arguments.task:
            load_delta(model, arguments.task)
        else:
            load_merged(model, arguments.merged)
        device = local_device()
        model.to(device)
        top1 = evaluate_top1(model, model, task, 4 * config.train.batch_size, device)
        if dist.get_rank() == 0:
            describe({"held-out samples": task.num_val, "top-1": f"{top1:.2%}"})


if __name__ == "__main__":
    run(main)
