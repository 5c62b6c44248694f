"""Check a data set that was downloaded, convert one to shards, or make a small one that takes its place."""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from _cli import make_parser, run
from _data_options import (
    ADE20K,
    EXAMPLE,
    FGVC,
    FOLDER,
    MINI,
    SHARDS,
    VTAB,
    add_ade20k,
    add_fgvc,
    add_folder,
    add_mini,
    add_shards,
    add_vtab,
)
from spt_dist import UserError
from spt_dist.data import catalogue
from spt_dist.data.ade20k import require_extra
from spt_dist.data.catalogue import Listed
from spt_dist.data.lists_check import check_lists
from spt_dist.data.lists_check import summarise as summarise_lists
from spt_dist.data.scenes import make_scenes
from spt_dist.data.shards.check import check_shards
from spt_dist.data.shards.check import summarise as summarise_shards
from spt_dist.data.shards.convert import convert
from spt_dist.data.shards.foreign import index_shards, read_classes
from spt_dist.data.shards.index import ShardIndex
from spt_dist.data.shards.sources import Source, source_of_ade20k, source_of_lists

NUM_SHOWN = 20
OF_SCENES = ("num_train", "num_val", "size", "seed")
OF_CONVERSION = ("shards", "shard_size", "workers", "seed", "skip_bad_samples")
OF_INDEX = ("classes", "train", "val")

Options = dict[str, Any]


def prepare_ade20k(options: Options) -> None:
    if "make_scenes" in options:
        root = options.pop("make_scenes")
        print(make_scenes(root, **only(options, OF_SCENES, "--make-scenes")))
        return
    require_extra("--convert" if "convert" in options else "--check")
    if "convert" in options:
        convert_to_shards(source_of_ade20k, options)
        return
    from spt_dist.data.ade20k_check import check_ade20k, summarise

    root = options.pop("check")
    only(options, (), "--check")
    reports = check_ade20k(root, num_threads())
    print(summarise(reports))
    require_none(root, [problem for report in reports for problem in report.problems])


def prepare_lists(
    options: Options, kind: str, there: Callable[[Path], list[str]], open_one: Callable[..., Listed]
) -> None:
    """VTAB and FGVC: ``kind`` is the option that names one of a root's data sets."""
    name = options.pop(kind, None)
    if "convert" in options:
        if name is None:
            raise UserError(
                f"--convert needs --{kind.replace('_', '-')}: one of {', '.join(there(Path(options['convert'])))}"
            )
        convert_to_shards(lambda root: source_of_lists(open_one(Path(root), name).read_all()), options)
        return
    root = Path(options.pop("check"))
    only(options, (), "--check")
    check_all(root, [open_one(root, found) for found in ([name] if name else there(root))])


def prepare_folder(options: Options) -> None:
    if "convert" in options:
        convert_to_shards(lambda root: source_of_lists(catalogue.image_folder(Path(root)).read_all()), options)
        return
    root = Path(options.pop("check"))
    only(options, (), "--check")
    check_all(root, [catalogue.image_folder(root)])


def prepare_shards(options: Options) -> None:
    if "index" in options:
        folder = options.pop("index")
        only(options, OF_INDEX, "--index")
        if "classes" not in options:
            raise UserError("--index needs --classes: their number, or a file with a name a line")
        patterns = {split: options.get(split, f"{split}-*.tar") for split in ("train", "val")}
        show(index_shards(folder, read_classes(options["classes"]), patterns, num_threads()))
        return
    location = options.pop("check")
    only(options, (), "--check")
    reports = check_shards(location, num_threads())
    print(summarise_shards(location, reports))
    require_none(location, [problem for report in reports for problem in report.problems])


def prepare_mini(options: Options) -> None:
    from spt_dist.data.mini.make import make_mini

    print(make_mini(options.pop("make"), **options))


def convert_to_shards(open_source: Callable[[str], Source], options: Options) -> None:
    root = options.pop("convert")
    only(options, OF_CONVERSION, "--convert")
    if "shards" not in options:
        raise UserError("--convert needs --shards: a new or empty folder for them")
    conversion = convert(
        open_source(root),
        options.pop("shards"),
        num_threads=options.pop("workers", num_threads()),
        skip_bad=options.pop("skip_bad_samples", False),
        **options,
    )
    show(conversion.index)
    if conversion.left_out:
        print(f"{len(conversion.left_out):,} bad samples are left out")


def check_all(root: Path, data_sets: Iterable[Listed]) -> None:
    problems = []
    for listed in data_sets:
        report = check_lists(listed, num_threads())
        print(summarise_lists(report))
        problems += report.problems
    require_none(root, problems)


def show(index: ShardIndex) -> None:
    for name, split in index.splits.items():
        num_bytes = sum(shard.num_bytes for shard in split.shards)
        print(f"{name}: {split.num_samples:,} samples, {len(split.shards):,} shards, {num_bytes:,} bytes")


def require_none(root: str | Path, problems: Sequence[str]) -> None:
    for problem in problems[:NUM_SHOWN]:
        print(f"wrong: {problem}")
    if len(problems) > NUM_SHOWN:
        print(f"... and {len(problems) - NUM_SHOWN:,} more")
    if problems:
        raise UserError(f"{root}: {len(problems):,} of its files are not what they should be, see above")
    print("all files are good")


def only(options: Options, allowed: Sequence[str], task: str) -> Options:
    """The options, if all that were given go with the task."""
    for name in options:
        if name not in allowed:
            others = {"--convert": OF_CONVERSION, "--make-scenes": OF_SCENES, "--index": OF_INDEX}
            right = next(other for other, names in others.items() if name in names)
            raise UserError(f"--{name.replace('_', '-')} goes with {right}, not with {task}")
    return options


def num_threads() -> int:
    return len(os.sched_getaffinity(0))


COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None], Callable[[Options], None]]] = {
    "vtab": (
        "VTAB-1k's 19 tasks: check or convert them",
        VTAB,
        add_vtab,
        lambda options: prepare_lists(options, "task", catalogue.vtab_tasks, catalogue.vtab_task),
    ),
    "fgvc": (
        "five fine-grained data sets: check or convert them",
        FGVC,
        add_fgvc,
        lambda options: prepare_lists(options, "data_set", catalogue.fgvc_sets, catalogue.fgvc_set),
    ),
    "folder": ("images in folders: check or convert them", FOLDER, add_folder, prepare_folder),
    "shards": ("shards: check them, or make an index", SHARDS, add_shards, prepare_shards),
    "ade20k": (
        "ADE20K: check or convert a copy, or draw scenes that take its place",
        ADE20K,
        add_ade20k,
        prepare_ade20k,
    ),
    "mini": ("the mini-benchmark: make it", MINI, add_mini, prepare_mini),
}


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", metavar="DATA_SET", required=True)
    for name, (summary, description, add, _) in COMMANDS.items():
        add(
            commands.add_parser(
                name,
                help=summary,
                description=description,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )
    options = vars(parser.parse_args())
    COMMANDS[options.pop("command")][3](options)


if __name__ == "__main__":
    run(main)
