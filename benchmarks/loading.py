"""Images a second to ready batches: shards and files read by ours, by torchvision's ImageFolder and by webdataset.

Makes JPEG photographs, as files and as shards, and reads an epoch of them, shuffled, to normalised fp32 batches on the
CPU; starting and ending the workers is part of it. The loaders take turns, and every repeat begins with another one.
ImageFolder and webdataset are used as their documentation has it, with images normalised one by one in the workers; and
"late", with what leaves the workers in grey levels and batches normalised in the main process, as ours are. "Reading
only" decodes nothing. Files are in the page cache. Printed are medians over the repeats: images a second, with their
spread, CPU time an image over all processes, and images a second as a ratio to ImageFolder in the same repeat, or of
"reading only" to webdataset.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from _loading import IMAGE_FOLDER, LOADERS, ONLY_READ, OURS_ONLY_READ, Reading, make_data
from _record import record
from spt_dist.tables import format_table

# In fp32 one value of each page of memory: a batch that a worker has written is not in this process's reach until then.
PAGE = 1024


@dataclass(frozen=True)
class Pass:
    """One epoch.

    Attributes:
        rate: images a second.
        cpu: milliseconds of CPU time an image, over all processes.
    """

    rate: float
    cpu: float


def measure(name: str, reading: Reading) -> Pass:
    """Read an epoch."""
    cpu, started, num_images = _cpu_seconds(), time.perf_counter(), 0
    for inputs, targets in LOADERS[name](reading):
        inputs.view(-1)[::PAGE].sum()
        num_images += len(targets)
    seconds = time.perf_counter() - started
    return Pass(num_images / seconds, 1000 * (_cpu_seconds() - cpu) / num_images)


def measure_all(folder: Path, workers: list[int], batch_size: int, repeats: int) -> dict[tuple[int, str], list[Pass]]:
    """Workers and loader -> a pass for each repeat, the loaders in turn."""
    names = list(LOADERS)
    passes: dict[tuple[int, str], list[Pass]] = {(number, name): [] for number in workers for name in names}
    for repeat in range(repeats):
        for number in workers:
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                passes[number, name].append(measure(name, Reading(folder, number, batch_size)))
    return passes


def rows_of(passes: dict[tuple[int, str], list[Pass]]) -> list[list[str]]:
    """The table, worker by worker."""
    rows = []
    for (number, name), own in passes.items():
        yardstick = passes[number, ONLY_READ if name in (ONLY_READ, OURS_ONLY_READ) else IMAGE_FOLDER]
        rates = [each.rate for each in own]
        ratios = [mine.rate / other.rate for mine, other in zip(own, yardstick, strict=True)]
        rows.append(
            [
                str(number),
                name,
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f} - {max(rates):,.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{statistics.median(each.cpu for each in own):.2f}",
            ]
        )
    return rows


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for, as for the workers of a loader that has ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Make the data, where it is not there, and print the table."""
    make_data(folder, arguments.images)
    sizes = [path.stat().st_size for path in (folder / "files").rglob("*.jpg")]
    passes = measure_all(folder, arguments.workers, arguments.batch_size, arguments.repeats)
    title = (
        f"{len(sizes):,} JPEG photographs of 400 to 500 px, {sum(sizes) / len(sizes) / 1000:.0f} kB on average, to "
        f"224 x 224 (bicubic), batches of {arguments.batch_size}; median of {arguments.repeats}, "
        f"{len(os.sched_getaffinity(0))} cores"
    )
    columns = ["workers", "loader", "images/s", "spread", "ratio", "CPU ms"]
    record(format_table(title, columns, rows_of(passes)), arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/loading.py --workers 1 2 4 8 --folder /data/photographs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the photographs are, or shall be kept")
    parser.add_argument("--out", type=Path, help="also write the table, dated, to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # More workers than cores are meant.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    if arguments.folder is not None:
        run(arguments.folder, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments)


if __name__ == "__main__":
    main()
