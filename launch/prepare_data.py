"""Check a data set that was downloaded, or draw a small one that takes its place."""

import argparse
import os

from _cli import make_parser, run
from spt_dist import UserError
from spt_dist.data.ade20k import require_extra
from spt_dist.data.scenes import make_scenes

EXAMPLE = """python launch/prepare_data.py ade20k --check data/ade/ADEChallengeData2016
  python launch/prepare_data.py ade20k --make-scenes data/scenes --num-train 400 --num-val 80"""
ADE20K = """ADE20K, the data set of the scene parsing challenge of 2016.

--check reads every file of a copy and tells what is in it and what is wrong with it; the exit status is 2 if anything
is. ROOT is the folder that has images/ and annotations/; the archive calls it ADEChallengeData2016.
--make-scenes draws scenes of textured shapes in the same layout and with some of the same classes, which take the
place of ADE20K where something is to be tried in minutes."""
NUM_SHOWN = 20


def add_ade20k(parser: argparse.ArgumentParser) -> None:
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", metavar="ROOT", help="the copy to be checked")
    task.add_argument("--make-scenes", metavar="ROOT", help="a new or empty folder to draw scenes into")
    scenes = parser.add_argument_group("with --make-scenes")
    # Without defaults of their own: those of make_scenes hold, and whether one was given is known.
    for name, what in {
        "--num-train": "training scenes (400)",
        "--num-val": "validation scenes (80)",
        "--size": "about how high a scene is, in pixels (96)",
        "--seed": "other seeds draw other scenes (0)",
    }.items():
        scenes.add_argument(name, type=int, metavar="N", default=argparse.SUPPRESS, help=what)


def prepare_ade20k(arguments: argparse.Namespace) -> None:
    given = {key: value for key, value in vars(arguments).items() if key in ("num_train", "num_val", "size", "seed")}
    if arguments.make_scenes is not None:
        print(make_scenes(arguments.make_scenes, **given))
        return
    if given:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} goes with --make-scenes, not with --check")
    require_extra("--check")
    from spt_dist.data.ade20k_check import check_ade20k, summarise

    reports = check_ade20k(arguments.check, len(os.sched_getaffinity(0)))
    print(summarise(reports))
    problems = [problem for report in reports for problem in report.problems]
    for problem in problems[:NUM_SHOWN]:
        print(f"wrong: {problem}")
    if len(problems) > NUM_SHOWN:
        print(f"... and {len(problems) - NUM_SHOWN:,} more")
    if problems:
        raise UserError(f"{arguments.check}: {len(problems):,} of its files are not what they should be, see above")
    print("all files are good")


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    data_sets = parser.add_subparsers(dest="data_set", metavar="DATA_SET", required=True)
    add_ade20k(
        data_sets.add_parser(
            "ade20k",
            help="ADE20K: check a copy, or draw scenes that take its place",
            description=ADE20K,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    prepare_ade20k(parser.parse_args())


if __name__ == "__main__":
    run(main)
