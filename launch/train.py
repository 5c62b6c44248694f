"""Train one config from scores to task file."""

import torch.distributed as dist

from _cli import add_config_options, describe, make_parser, read_config, run
from spt_dist.parallel.launch import process_group
from spt_dist.training.monitor import SpeedSummary
from spt_dist.training.pipeline import run_training

EXAMPLE = "deepspeed --num_accelerators 2 launch/train.py configs/quickstart/digits_spt_lora.py"


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    add_config_options(parser)
    parser.add_argument("--work-dir", help="where everything is written (default: work_dirs/NAME_OF_CONFIG)")
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="auto|PATH", help="go on from the latest or the given checkpoint"
    )
    parser.add_argument("--launcher", metavar="NAME", help="taken for mmseg's sake; the environment tells the launcher")
    parser.add_argument("--engine", help="ddp, fsdp or deepspeed, instead of the config's")
    parser.add_argument(
        "--amp", action="store_true", help="autocast (engine.amp_dtype, bfloat16 by default)"
    )
    arguments = parser.parse_args()
    config = read_config(arguments)
    with process_group(config.engine.timeout) as group:
        result = run_training(config, arguments.config, arguments.resume, group.watch.report, group.stop)
        if dist.get_rank() == 0:
            describe(
                {
                    "method": result.method,
                    "trainable parameters": f"{result.num_trainable:,} (and {result.num_head:,} of the head)",
                    "top-1 on held-out samples": f"{result.top1:.2%}",
                    "scoring, training": f"{result.seconds_scoring:.1f} s, {result.seconds_training:.1f} s",
                    **describe_speed(result.speed),
                    "task file": result.task_file,
                }
            )


def describe_speed(speed: SpeedSummary) -> dict[str, str]:
    """What a run that trained says about its speed; nothing for one that was resumed behind its last step."""
    if speed.samples_per_second is None or speed.data_wait is None:
        return {}
    return {
        "speed": f"{speed.samples_per_second:.0f} samples/s, {speed.data_wait:.1%} waiting for data",
        "peak memory": f"{max(speed.peak_memory_gib):.2f} GiB on a rank",
    }


if __name__ == "__main__":
    run(main)
