"""Train one config from scores to task file, or the configs of a suite one after another."""

import argparse
from dataclasses import replace

import torch.distributed as dist

from _cli import add_config_options, add_data_options, describe, make_parser, overridden, read_config, run
from spt_dist import UserError
from spt_dist.evaluation.scores import METRIC_LABELS
from spt_dist.parallel.environment import read_environment
from spt_dist.parallel.launch import process_group
from spt_dist.sections import RunConfig
from spt_dist.suites import is_suite, load_suite
from spt_dist.training.monitor import SpeedSummary
from spt_dist.training.pipeline import plan_dry, run_training
from spt_dist.training.suite import run_suite

EXAMPLE = """deepspeed --num_accelerators 2 launch/train.py configs/quickstart/digits_spt_lora.py
  deepspeed launch/train.py configs/vtab/all.py --resume"""


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    add_config_options(parser)
    add_data_options(parser)
    parser.add_argument("--work-dir", help="where everything is written (default: work_dirs/NAME_OF_CONFIG)")
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="auto|PATH", help="go on from the latest or the given checkpoint"
    )
    parser.add_argument("--launcher", metavar="NAME", help="taken for mmseg's sake; the environment tells the launcher")
    parser.add_argument("--engine", help="ddp, fsdp or deepspeed, instead of the config's")
    parser.add_argument("--amp", action="store_true", help="autocast (engine.amp_dtype, bfloat16 by default)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what would be trained, and each rank's memory",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="with --dry-run: how many ranks (default: the launcher's)"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="with --dry-run: the largest batch that fits")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="of a suite, run these tasks only")
    parser.add_argument(
        "--member", metavar="NAME", help="of a suite, train this task and write nothing for the suite (job arrays)"
    )
    arguments = parser.parse_args()
    if is_suite(arguments.config) and arguments.member is None:
        train_suite(arguments)
        return
    config, path = read_task(arguments)
    if arguments.dry_run:
        tell_needs(config, arguments.ranks, arguments.memory)
        return
    with process_group(config.engine.timeout) as group:
        result = run_training(config, path, arguments.resume, group.watch.report, group.stop)
        if dist.get_rank() == 0:
            describe(
                {
                    "method": result.method,
                    "trainable parameters": f"{result.num_trainable:,} (and {result.num_head:,} of the head)",
                    f"{METRIC_LABELS[result.metric]} on held-out samples": f"{result.scores[result.metric]:.2%}",
                    "scoring, training": f"{result.seconds_scoring:.1f} s, {result.seconds_training:.1f} s",
                    **describe_speed(result.speed),
                    "task file": result.task_file,
                }
            )


def read_task(arguments: argparse.Namespace) -> tuple[RunConfig, str]:
    """The config of one task, or of the member of a suite that is asked for, and its path."""
    if not is_suite(arguments.config):
        for option, value in {"--tasks": arguments.tasks, "--member": arguments.member}.items():
            if value:
                raise UserError(f"{option}: {arguments.config} is one task's config, not a suite")
        return read_config(arguments), arguments.config
    if arguments.tasks:
        raise UserError("--tasks: is for a suite; --member trains a single task")
    suite = load_suite(arguments.config, arguments.cfg_options, arguments.work_dir, [arguments.member])
    member = suite.members[0]
    return overridden(member.config, arguments), str(member.path)


def train_suite(arguments: argparse.Namespace) -> None:
    """Run a suite and print its table."""
    if arguments.dry_run or arguments.resume not in (None, "auto"):
        option = "--dry-run" if arguments.dry_run else f"--resume {arguments.resume}"
        raise UserError(f"{option}: {arguments.config} is a suite; give this option with one task's config")
    suite = load_suite(arguments.config, arguments.cfg_options, arguments.work_dir, arguments.tasks)
    members = [replace(member, config=overridden(member.config, arguments)) for member in suite.members]
    with process_group(members[0].config.engine.timeout) as group:
        run_suite(replace(suite, members=members), arguments.resume is not None, group.watch.report, group.stop)
        if dist.get_rank() == 0:
            # Here, for it brings matplotlib, and most runs are no suites.
            from spt_dist.report.suites import report_suites

            table, files = report_suites([suite.work_dir], suite.work_dir)
            print(table)
            describe(files)


def tell_needs(config: RunConfig, ranks: int | None, memory_gib: float | None) -> None:
    """Print the dry run; on rank 0 alone, where a launcher has started several."""
    for option, value in (("--ranks", ranks), ("--memory", memory_gib)):
        if value is not None and value <= 0:
            raise UserError(f"{option} {value}: has to be above 0")
    environment = read_environment()
    if environment.rank == 0:
        print(plan_dry(config, ranks or environment.world_size, memory_gib).table())


def describe_speed(speed: SpeedSummary) -> dict[str, str]:
    """What a run that trained says about its speed; nothing for one that was resumed behind its last step."""
    if speed.samples_per_second is None or speed.data_wait is None:
        return {}
    return {
        "speed": f"{speed.samples_per_second:,.1f} samples/s, {speed.data_wait:.1%} waiting for data",
        "peak memory": f"{max(speed.peak_memory_gib):.2f} GiB on a rank",
    }


if __name__ == "__main__":
    run(main)
