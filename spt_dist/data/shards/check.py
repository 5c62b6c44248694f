"""Whether shards are what their index says, and every sample in them is good."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from spt_dist.data.samples import BadSampleError
from spt_dist.data.shards.index import INDEX_NAME, Shard, ShardIndex, Split
from spt_dist.data.shards.openers import shown
from spt_dist.data.shards.tar import StoredSample
from spt_dist.data.shards.through import examine, read_through
from spt_dist.progress import Bar, progress_bar
from spt_dist.tables import format_table


@dataclass(frozen=True)
class SplitReport:
    """What one split has.

    Attributes:
        name: of the split.
        split: what the index says.
        problems: what is wrong, a line each; all of them name the shard.
    """

    name: str
    split: Split
    problems: tuple[str, ...]


def check_shards(location: str, num_threads: int, show_progress: bool = True) -> list[SplitReport]:
    """Read every shard in full, compare it with the index, and decode every image and mask.

    Args:
        location: where the shards are; see ``openers.open_stream``.
        num_threads: how many shards are read at a time.
        show_progress: whether to show a bar.

    Returns:
        a report on each split.

    Raises:
        UserError: the index can't be read, or has no samples.
    """
    index = ShardIndex.load(location)
    num_samples = sum(split.num_samples for split in index.splits.values())
    reports = []
    pool = ThreadPoolExecutor(num_threads)
    try:
        with progress_bar("reading shards", num_samples, show_progress) as bar:
            for name, split in index.splits.items():
                problems = pool.map(lambda shard: _check(location, index, shard, bar), split.shards)
                reports.append(SplitReport(name, split, tuple(problem for found in problems for problem in found)))
    finally:
        # Whoever stops half-way does not wait for the rest.
        pool.shutdown(cancel_futures=True)
    return reports


def summarise(location: str, reports: Sequence[SplitReport]) -> str:
    """A table of what there is."""
    rows = {
        "shards": [f"{len(report.split.shards):,}" for report in reports],
        "samples": [f"{report.split.num_samples:,}" for report in reports],
        "bytes": [f"{sum(shard.num_bytes for shard in report.split.shards):,}" for report in reports],
        "problems": [f"{len(report.problems):,}" for report in reports],
    }
    columns = ["", *(report.name for report in reports)]
    return format_table(shown(location, INDEX_NAME), columns, [[name, *cells] for name, cells in rows.items()])


def _check(location: str, index: ShardIndex, shard: Shard, bar: Bar) -> list[str]:
    def visit(position: int, name: str, stored: StoredSample) -> None:
        bar.advance()
        if position < shard.num_samples and stored.checksum != shard.checksum(position):
            raise BadSampleError(f"{name}: is not what was written; its checksum differs from the index")
        examine(stored, name, index.kind, len(index.classes))

    found = read_through(location, shard.name, visit)
    problems, path = list(found.problems), shown(location, shard.name)
    wrong = [
        f"{what} {there:,}, not {said:,}"
        for what, there, said in (
            ("number of bytes", found.shard.num_bytes, shard.num_bytes),
            ("number of samples", found.shard.num_samples, shard.num_samples),
        )
        if there != said
    ]
    if found.shard.sha256 != shard.sha256:
        wrong.append("its sha256 differs")
    # A file that could not be opened has been named.
    if wrong and found.shard.num_bytes:
        problems.append(f"{path}: is not the file of the index: {', '.join(wrong)}")
    return problems
