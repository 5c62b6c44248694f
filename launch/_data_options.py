"""The options of ``prepare_data.py``."""

import argparse
from typing import Any

EXAMPLE = """python launch/prepare_data.py vtab --check data/vtab-1k
  python launch/prepare_data.py fgvc --convert data/fgvc --data-set cub --shards data/shards/cub
  python launch/prepare_data.py shards --check data/shards/cub
  python launch/prepare_data.py ade20k --make-scenes data/scenes --num-train 400 --num-val 80"""
CHECK_AND_CONVERT = """
--check reads every file of a copy and tells what is in it and what is wrong with it; the exit status is 2 if anything
is. --convert writes its files, as they are, to shards: tar files that webdataset reads too, with an index and
checksums. One that was interrupted goes on when it is called again. docs/prepare_data.md tells more."""
ADE20K = f"""ADE20K, the data set of the scene parsing challenge of 2016. ROOT is the folder that has images/ and
annotations/; the archive calls it ADEChallengeData2016.
{CHECK_AND_CONVERT}
--make-scenes draws scenes of textured shapes in the same layout and with some of the same classes, which take the
place of ADE20K where something is to be tried in minutes."""
VTAB = f"""VTAB-1k. ROOT is the folder that has a folder for each task, as NOAH's script writes them.
{CHECK_AND_CONVERT}"""
FGVC = f"""Five fine-grained data sets with VPT's lists. ROOT is the folder that has a folder for each of them.
{CHECK_AND_CONVERT}"""
FOLDER = f"""Images in folders. ROOT has train/CLASS/, val/CLASS/ and maybe test/CLASS/.
{CHECK_AND_CONVERT}"""
MINI = """The mini-benchmark: eight small tasks in VTAB-1k's layout, drawn without a download; see docs/mini.md."""
SHARDS = """Shards, be they from --convert or from others.

--check reads every shard in full: its size and sha256, the number and the checksums of its samples, and it decodes
every image; the exit status is 2 if anything is wrong. LOCATION is a folder, a URL, or pipe:COMMAND.
--index makes an index for shards that others have written."""
CHECK = {"--check": ("ROOT", "the copy to be checked"), "--convert": ("ROOT", "the copy to be made into shards")}


def add_options(group: Any, options: dict[str, tuple[Any, str, str]]) -> None:
    # Without defaults: those of the functions hold, and whether one was given is known.
    for name, (type_, metavar, what) in options.items():
        group.add_argument(name, type=type_, metavar=metavar, default=argparse.SUPPRESS, help=what)


def add_tasks(parser: argparse.ArgumentParser, tasks: dict[str, tuple[str, str]]) -> None:
    group = parser.add_mutually_exclusive_group(required=True)
    add_options(group, {name: (str, metavar, what) for name, (metavar, what) in tasks.items()})


def add_conversion(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    group = parser.add_argument_group("with --convert")
    add_options(
        group,
        {
            "--shards": (str, "OUT", "where the shards go: a new or empty folder, or an interrupted conversion's"),
            "--shard-size": (int, "N", "most samples of a shard (1000)"),
            "--workers": (int, "N", "shards that are written at a time (one for each core)"),
        },
    )
    if seed:
        add_options(group, {"--seed": (int, "N", "other seeds shuffle training samples differently (0)")})
    group.add_argument(
        "--skip-bad-samples",
        action="store_true",
        default=argparse.SUPPRESS,
        help="leave out samples that can't be read, with a count, instead of ending there",
    )


def add_ade20k(parser: argparse.ArgumentParser) -> None:
    add_tasks(parser, CHECK | {"--make-scenes": ("ROOT", "a new or empty folder to draw scenes into")})
    add_conversion(parser, seed=False)
    add_options(
        parser.add_argument_group("with --make-scenes"),
        {
            "--num-train": (int, "N", "training scenes (400)"),
            "--num-val": (int, "N", "validation scenes (80)"),
            "--size": (int, "N", "about how high a scene is, in pixels (96)"),
            "--seed": (int, "N", "other seeds draw other scenes, or shuffle training samples differently (0)"),
        },
    )


def add_vtab(parser: argparse.ArgumentParser) -> None:
    add_tasks(parser, CHECK)
    add_options(parser, {"--task": (str, "TASK", "one of them, cifar for example; --check takes all that are there")})
    add_conversion(parser)


def add_fgvc(parser: argparse.ArgumentParser) -> None:
    add_tasks(parser, CHECK)
    add_options(parser, {"--data-set": (str, "NAME", "one of them, cub for example; --check takes all that are there")})
    add_conversion(parser)


def add_folder(parser: argparse.ArgumentParser) -> None:
    add_tasks(parser, CHECK)
    add_conversion(parser)


def add_shards(parser: argparse.ArgumentParser) -> None:
    add_tasks(
        parser,
        {"--check": ("LOCATION", "where index.json and the shards are"), "--index": ("FOLDER", "where the shards are")},
    )
    add_options(
        parser.add_argument_group("with --index"),
        {
            "--classes": (str, "N|FILE", "how many classes there are, or a file with their names, one a line"),
            "--train": (str, "PATTERN", "what the shards of the training samples are called ('train-*.tar')"),
            "--val": (str, "PATTERN", "what those of the held-out samples are called ('val-*.tar')"),
        },
    )


def add_mini(parser: argparse.ArgumentParser) -> None:
    add_tasks(parser, {"--make": ("ROOT", "a folder for it; tasks that are there already are left as they are")})
    add_options(
        parser,
        {
            "--seed": (int, "N", "other seeds draw other pictures (0)"),
            "--num-test": (int, "N", "test pictures of each task (1000)"),
        },
    )
