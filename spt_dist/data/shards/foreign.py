"""An index for shards that others have written."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spt_dist.data.shards.index import INDEX_NAME, Shard, ShardIndex, Split
from spt_dist.data.shards.openers import open_stream
from spt_dist.data.shards.shard_set import raw_sample
from spt_dist.data.shards.tar import LABEL, MASK, SampleReader, StoredSample
from spt_dist.data.shards.through import read_through
from spt_dist.data.task import CLASSIFICATION, SEGMENTATION
from spt_dist.errors import UserError
from spt_dist.files import write_text
from spt_dist.progress import progress_bar


def index_shards(
    folder: str | Path,
    classes: Sequence[str],
    patterns: Mapping[str, str],
    num_threads: int,
    show_progress: bool = True,
) -> ShardIndex:
    """Read every shard in full, and write ``index.json`` beside them.

    Images are not decoded; ``check_shards`` does that.

    Args:
        folder: where the tar files are.
        classes: name of each class.
        patterns: split -> shell pattern of the names of its shards. They are taken in the order of their names.
        num_threads: how many shards are read at a time.
        show_progress: whether to show a bar.

    Raises:
        UserError: there is an index already; no shard or no sample is found; a shard is damaged; a sample lacks its
            image or its label or mask, or its label is out of range.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).exists():
        raise UserError(f"{folder / INDEX_NAME}: is there already; remove it if it is to be made anew")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = {split: _names(folder, split, pattern) for split, pattern in patterns.items()}
    kind = _kind(folder, next(name for some in names.values() for name in some))
    splits = {}
    pool = ThreadPoolExecutor(num_threads)
    try:
        with progress_bar("reading shards", sum(map(len, names.values())), show_progress) as bar:
            for split, some in names.items():
                shards = []
                for shard in pool.map(lambda name: _read(folder, name, kind, len(classes)), some):
                    shards.append(shard)
                    bar.advance()
                splits[split] = Split(tuple(shards))
    finally:
        # Whoever stops half-way does not wait for the rest.
        pool.shutdown(cancel_futures=True)
    text = ShardIndex(kind, tuple(classes), splits).to_json()
    # Names of files that others chose may be none that an index can have.
    index = ShardIndex.parse(text.encode(), str(folder / INDEX_NAME))
    write_text(folder / INDEX_NAME, text)
    return index


def read_classes(value: str) -> tuple[str, ...]:
    """The names of classes: from their number, or from a file with one a line.

    Raises:
        UserError: it is neither.
    """
    if value.isascii() and value.isdigit():
        if int(value) == 0:
            raise UserError("--classes 0: has to be at least 1")
        return tuple(str(k) for k in range(int(value)))
    try:
        names = [line.strip() for line in Path(value).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {value}: is no number, and no file with a name a line ({error})") from error
    if not names or not all(names):
        raise UserError(f"--classes {value}: has an empty line, or none; one class a line is wanted")
    return tuple(names)


def _names(folder: Path, split: str, pattern: str) -> list[str]:
    names = sorted(path.name for path in folder.glob(pattern) if path.is_file())
    if not names:
        raise UserError(f"{folder}: has no file {pattern!r}, which the shards of {split!r} are called by")
    return names


def _kind(folder: Path, name: str) -> str:
    """Of the task, by the first sample."""
    stream = open_stream(str(folder), name)
    try:
        stored = SampleReader(stream).read()
    finally:
        stream.close()
    files = {} if stored is None else stored.files
    if MASK in files:
        return SEGMENTATION
    if LABEL in files:
        return CLASSIFICATION
    raise UserError(f"{folder / name}: its first sample has neither a .{LABEL} nor a .{MASK}; is it a shard of labels?")


def _read(folder: Path, name: str, kind: str, num_classes: int) -> Shard:
    def visit(position: int, sample: str, stored: StoredSample) -> None:
        raw_sample(stored, sample, kind, num_classes)

    found = read_through(str(folder), name, visit)
    if found.problems:
        more = f" (and {len(found.problems) - 1:,} more)" if len(found.problems) > 1 else ""
        raise UserError(f"{found.problems[0]}{more}; only shards in which all is good get an index")
    return found.shard
