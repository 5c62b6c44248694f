"""Data sets to shards: in parallel, and to be gone on with after an interruption."""

import json
import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any, Final

from spt_dist.data.samples import BadSampleError
from spt_dist.data.shards.index import INDEX_NAME, Shard, ShardIndex, Split
from spt_dist.data.shards.journal import Journal, Written
from spt_dist.data.shards.sources import Source
from spt_dist.data.shards.writer import Members, write_shard
from spt_dist.errors import UserError
from spt_dist.files import write_text
from spt_dist.progress import Bar, progress_bar

SHARD_SIZE: Final = 1000
NUM_NAMED: Final = 3
# What a process that was killed leaves of a file that it was writing; see write_atomically.
_LEFTOVER = re.compile(r"\.[A-Za-z0-9._-]+\.(?:tar|json)\.[a-z0-9_]{8}")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What a conversion has made.

    Attributes:
        index: the index as it is written.
        left_out: what is wrong with each sample that is not in a shard.
    """

    index: ShardIndex
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """A shard that is to be written: its samples are entries of its split, in this order."""

    name: str
    split: str
    indices: Sequence[int]


class _Halted(Exception):
    """Another shard has failed."""


def convert(
    source: Source,
    out: str | Path,
    *,
    num_threads: int,
    shard_size: int = SHARD_SIZE,
    seed: int = 0,
    skip_bad: bool = False,
    show_progress: bool = True,
) -> Conversion:
    """Write a data set's shards and their index. Called again after an interruption it goes on.

    Samples are called after their place in the list, from 0. Those of splits whose names begin with "train" are
    shuffled first: readers shuffle within a window only. The bytes depend on the source, ``shard_size`` and ``seed``.

    Args:
        source: the data set; every file is read in full and checked.
        out: a new or empty folder, or one with the shards of an interrupted conversion of the same.
        num_threads: how many shards are written at a time. Threads do: reading, decoding and checksums leave Python.
        shard_size: most samples of a shard.
        seed: of the shuffle.
        skip_bad: whether samples that are not good are left out, with a warning, instead of ending the conversion.
        show_progress: whether to show a bar.

    Raises:
        UserError: ``out`` has something else in it, lies among what is converted, or the other way round; a sample is
            not good; the disk is full. Complete shards stay, and nothing that is half-written.
    """
    out = Path(out)
    _require_apart(source.root, out)
    for name, value in (("--shard-size", shard_size), ("--workers", num_threads)):
        if value < 1:
            raise UserError(f"{name} {value}: has to be at least 1")
    plans = _plan(source, shard_size, seed)
    try:
        with Journal(out, _request(source, shard_size, seed)) as journal:
            _remove_leftovers(out)
            left = [plan for plan in plans if not _is_done(out, journal.written.get(plan.name), skip_bad)]
            num_left, num_all = (sum(len(plan.indices) for plan in some) for some in (left, plans))
            if num_left < num_all:
                _logger.info("%s: %s of %s samples are there", out, f"{num_all - num_left:,}", f"{num_all:,}")
            with progress_bar("writing shards", num_all, show_progress, num_all - num_left) as bar:
                _write_all(left, source, out, journal, num_threads, skip_bad, bar)
            conversion = _finish(source, plans, journal)
            write_text(out / INDEX_NAME, conversion.index.to_json())
            journal.remove()
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror}); once it can, the same command goes on") from error
    if conversion.left_out:
        _warn(out, conversion.left_out)
    return conversion


def _require_apart(root: Path, out: Path) -> None:
    """Shards are no part of what is converted: a folder in an image folder is a class of it."""
    inner, outer = root.resolve(), out.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"--shards {out}: has to lie beside {root}, which is converted, neither in it nor around it")


def _plan(source: Source, shard_size: int, seed: int) -> list[_Plan]:
    plans = []
    for split, entries in source.splits.items():
        if not entries:
            raise UserError(f"{source.root}: split {split!r} has no samples")
        order = list(range(len(entries)))
        if split.startswith("train"):
            # Sorted by random numbers: of what Python draws from a seed, only random() stays the same in all versions.
            draw = random.Random(seed)
            order.sort(key=[draw.random() for _ in order].__getitem__)
        num_shards = math.ceil(len(order) / shard_size)
        for number in range(num_shards):
            # Sizes differ by one at most.
            start, end = (len(order) * place // num_shards for place in (number, number + 1))
            plans.append(_Plan(f"{split}-{number:06d}.tar", split, order[start:end]))
    return plans


def _request(source: Source, shard_size: int, seed: int) -> dict[str, Any]:
    listed = json.dumps([list(source.classes), {split: list(entries) for split, entries in source.splits.items()}])
    return {
        "kind": source.kind,
        "samples": {split: len(entries) for split, entries in source.splits.items()},
        "classes": len(source.classes),
        "list": sha256(listed.encode()).hexdigest(),
        "shard size": shard_size,
        "seed": seed,
    }


def _is_done(out: Path, written: Written | None, skip_bad: bool) -> bool:
    """Whether a shard need not be written: its size is looked at, for it was on the disk when it was noted."""
    if written is None or (written.left_out and not skip_bad):
        return False
    if written.shard.num_samples == 0:
        return True
    path = out / written.shard.name
    return path.is_file() and path.stat().st_size == written.shard.num_bytes


def _remove_leftovers(out: Path) -> None:
    for path in out.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink()


def _write_all(
    plans: Sequence[_Plan], source: Source, out: Path, journal: Journal, num_threads: int, skip_bad: bool, bar: Bar
) -> None:
    halt = Event()
    pool = ThreadPoolExecutor(num_threads)
    try:
        futures = [pool.submit(_write, plan, source, out, skip_bad, bar, halt) for plan in plans]
        for future in as_completed(futures):
            # Whoever was halted may come before the one that failed.
            if not isinstance(future.exception(), _Halted):
                journal.add(future.result())
    finally:
        halt.set()
        pool.shutdown(cancel_futures=True)


def _write(plan: _Plan, source: Source, out: Path, skip_bad: bool, bar: Bar, halt: Event) -> Written:
    left_out: list[str] = []

    def read() -> Iterator[Members]:
        for index in plan.indices:
            if halt.is_set():
                raise _Halted
            try:
                members = source.read(source.splits[plan.split][index], f"{index:08d}")
            except BadSampleError as error:
                if not skip_bad:
                    raise UserError(f"{error}; mend it, or leave out what is bad with --skip-bad-samples") from error
                left_out.append(str(error))
            else:
                yield members
            bar.advance()

    try:
        shard = write_shard(out / plan.name, read())
    except BaseException:
        halt.set()
        raise
    if shard.num_samples == 0:
        (out / plan.name).unlink()
    return Written(shard, tuple(left_out))


def _finish(source: Source, plans: Sequence[_Plan], journal: Journal) -> Conversion:
    splits: dict[str, Split] = {}
    left_out: list[str] = []
    for split, entries in source.splits.items():
        written = [journal.written[plan.name] for plan in plans if plan.split == split]
        bad = [problem for one in written for problem in one.left_out]
        if len(bad) == len(entries):
            raise UserError(f"none of the {len(entries):,} samples of split {split!r} is good; the first: {bad[0]}")
        shards: list[Shard] = [one.shard for one in written if one.shard.num_samples]
        splits[split] = Split(tuple(shards))
        left_out += bad
    return Conversion(ShardIndex(source.kind, source.classes, splits), tuple(left_out))


def _warn(out: Path, left_out: Sequence[str]) -> None:
    named = list(left_out[:NUM_NAMED])
    if len(left_out) > NUM_NAMED:
        named.append(f"... and {len(left_out) - NUM_NAMED:,} more")
    _logger.warning("%s: %s bad samples are left out:\n%s", out, f"{len(left_out):,}", "\n".join(named))
