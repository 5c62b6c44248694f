"""Single weights of a layer as one small block or one by one: which is faster, and where to change over.

Forward and backward of a Linear layer with tuned single weights, both ways in turn, beside the plain frozen layer. The
weights are in random rows and columns, so that a block has more and more elements for each of them. The rule in
``tuning.sparse`` (``BLOCK_LIMIT``) takes the block as long as that number is small enough.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import spt_dist  # isort: skip  # noqa: F401  # makes torchvision importable beside a CPU torch

import torch
from torch import Tensor
from torch.nn import functional as F

from _record import record
from spt_dist.tables import format_table
from spt_dist.tuning.sparse import BLOCK_LIMIT, SparseDelta

LAYERS = ((768, 768), (3072, 768), (768, 3072))
COUNTS = (100, 300, 1000, 3000)
# Elements of the block for each chosen weight that are aimed at.
FILLINGS = (4, 30, 100, 300)


def choose(out_features: int, in_features: int, count: int, filling: int, generator: torch.Generator) -> Tensor | None:
    """``count`` flat positions in about ``filling * count`` elements of a block, ``None`` where it has no room."""
    size = filling * count
    num_columns = min(in_features, round((size * in_features / out_features) ** 0.5))
    num_rows = min(out_features, round(size / num_columns))
    if num_rows * num_columns < 0.9 * size:
        return None
    rows = torch.randperm(out_features, generator=generator)[:num_rows]
    columns = torch.randperm(in_features, generator=generator)[:num_columns]
    inside = torch.randperm(num_rows * num_columns, generator=generator)[:count]
    return (rows[inside // num_columns] * in_features + columns[inside % num_columns]).sort().values


def measure(run: Callable[[], Tensor], grad: Tensor, repeats: int) -> float:
    """Median milliseconds of a forward and backward."""
    clock = time.perf_counter if grad.is_cuda else time.process_time
    times = []
    for _ in range(repeats + 1):
        if grad.is_cuda:
            torch.cuda.synchronize()
        started = clock()
        run().backward(grad)
        if grad.is_cuda:
            torch.cuda.synchronize()
        times.append(clock() - started)
    return 1e3 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/sparse.py --batch-size 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images, of 197 tokens each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table, dated, to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    rows = []
    for out_features, in_features in LAYERS:
        x = torch.randn(arguments.batch_size * 197, in_features, device=device, requires_grad=True)
        weight = torch.randn(out_features, in_features, device=device)
        grad = torch.randn(len(x), out_features, device=device)
        plain = measure(partial(F.linear, x, weight), grad, 3 * arguments.repeats)
        for count in COUNTS:
            for filling in FILLINGS:
                positions = choose(out_features, in_features, count, filling, generator)
                if positions is None:
                    continue
                delta = SparseDelta(positions, in_features, torch.device(device))
                times = {}
                for delta.as_block in (True, False):
                    run = partial(delta.linear, x, weight, None)
                    times[delta.as_block] = measure(run, grad, arguments.repeats)
                elements = len(delta.rows) * len(delta.columns) / count
                chosen = times[elements <= BLOCK_LIMIT]
                cells = [times[True], times[False], times[True] / times[False], chosen / plain]
                shape = f"{out_features} x {in_features}"
                rows.append(
                    [shape, f"{count:,}", f"{elements:.0f}", f"{plain:.1f}", *(f"{cell:.2f}" for cell in cells)]
                )
    title = (
        f"milliseconds, batch of {arguments.batch_size} x 197 tokens, fp32, median of {arguments.repeats}; "
        f"the block is chosen up to {BLOCK_LIMIT} elements a weight"
    )
    columns = ["layer", "weights", "elements a weight", "plain", "block", "single", "block / single", "chosen / plain"]
    record(format_table(title, columns, rows), arguments.out)


if __name__ == "__main__":
    main()
