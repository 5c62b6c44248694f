"""How good a task file or a merged checkpoint is on the held-out samples of its task."""

import argparse
from pathlib import Path

import torch.distributed as dist

from _cli import add_config_options, add_data_options, describe, make_parser, read_config, run
from spt_dist import UserError, load_delta
from spt_dist.data.task import SEGMENTATION, Task
from spt_dist.data.tasks import build_task
from spt_dist.evaluation.scores import METRIC_LABELS, MULTI_SCALES, evaluate
from spt_dist.hosts import rank_zeros_file
from spt_dist.models.checkpoints import load_merged
from spt_dist.parallel.launch import local_device, process_group
from spt_dist.training.scoring import build_model

EXAMPLE = (
    "python launch/evaluate.py configs/quickstart/digits_spt_lora.py --task work_dirs/digits_spt_lora/task.safetensors"
)


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    add_config_options(parser)
    add_data_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", metavar="FILE", help="task file written by launch/train.py")
    source.add_argument("--merged", metavar="FILE", help="checkpoint written by launch/merge.py")
    parser.add_argument(
        "--multi-scale", action="store_true", help="segmentation: also in six sizes, each mirrored too (mIoU m.s.)"
    )
    parser.add_argument(
        "--visualize",
        type=int,
        metavar="N",
        help="segmentation: pictures of N images with labels and predictions",
    )
    parser.add_argument("--out", metavar="FOLDER", help="for the pictures (default: panels beside FILE)")
    arguments = parser.parse_args()
    config = read_config(arguments)
    with process_group(config.engine.timeout):
        task = build_task(config.data, config.model.num_classes, config.model.normalize)
        check_options(arguments, task)
        model = build_model(config)
        with rank_zeros_file(Path(arguments.task or arguments.merged)) as path:
            if arguments.task:
                load_delta(model, path)
            else:
                load_merged(model, path)
        device = local_device()
        model.to(device)
        found: dict[str, str | int | Path] = {"held-out samples": task.num_val}
        if task.normalisation is not None:
            found["normalised as"] = str(task.normalisation)
        for suffix, multi_scale in {"": False, " m.s.": True}.items() if arguments.multi_scale else [("", False)]:
            scores = evaluate(model, model, task, 4 * config.train.batch_size, device, multi_scale)
            found |= {METRIC_LABELS[name] + suffix: f"{score:.2%}" for name, score in scores.items()}
        if arguments.visualize:
            from spt_dist.evaluation.panels import write_panels

            folder = Path(arguments.out or Path(arguments.task or arguments.merged).parent / "panels")
            scales = MULTI_SCALES if arguments.multi_scale else (1.0,)
            count, flip = arguments.visualize, arguments.multi_scale
            pictures = write_panels(model, model, task, device, folder, count, scales, flip)
            found |= {"pictures": f"{len(pictures)} in {folder}"}
        if dist.get_rank() == 0:
            describe(found)


def check_options(arguments: argparse.Namespace, task: Task) -> None:
    """Refuse options that are for another kind of task."""
    for option in ("multi_scale", "visualize"):
        if getattr(arguments, option) and task.kind != SEGMENTATION:
            raise UserError(f"--{option.replace('_', '-')}: is for segmentation; this config's task is {task.kind}")
    if arguments.out is not None and arguments.visualize is None:
        raise UserError(f"--out {arguments.out}: is for the pictures of --visualize N")
    if arguments.visualize is not None and arguments.visualize < 1:
        raise UserError(f"--visualize {arguments.visualize}: has to be 1 or more")


if __name__ == "__main__":
    run(main)
