"""The two ways of summing scores over ranks: whole sums on each rank and one exchange, or parts sent as they come.

Every measurement starts its ranks anew (gloo, one thread each). Printed are medians of the time of the slowest rank and
of the growth of resident memory, both without the model and beside a plain forward and backward over the same batches.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import spt_dist  # isort: skip  # makes timm importable beside a CPU torch

import timm
import torch
import torch.distributed as dist
from torch.nn import functional as F

from _memory import peak_bytes, reset_peak
from _record import record
from spt_dist.tables import format_table

WAYS = {"plain forward + backward": None, "whole sums": False, "sums in parts": True}


def run_rank(way: str, rank: int, world_size: int, folder: str, model_name: str, num_batches: int, size: int) -> None:
    """Score some batches on one rank; writes seconds and bytes to a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model = timm.create_model(model_name, num_classes=100).eval()
    batches = [(torch.randn(size, 3, 224, 224), torch.randint(100, (size,))) for _ in range(num_batches)]
    F.cross_entropy(model.requires_grad_(False)(batches[0][0][:1]), batches[0][1][:1])
    dist.barrier()
    before = reset_peak()
    started = time.perf_counter()
    if WAYS[way] is None:
        model.requires_grad_(True)
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()
            model.zero_grad()
    else:
        spt_dist.estimate_sensitivity(model, batches, F.cross_entropy, shard_sums=WAYS[way])
    dist.barrier()
    seconds = time.perf_counter() - started
    Path(folder, f"rank-{rank}").write_text(f"{seconds} {peak_bytes() - before}")
    dist.destroy_process_group()


def measure(way: str, world_size: int, model_name: str, num_batches: int, size: int) -> tuple[float, float]:
    """Seconds of the slowest rank and MiB of the largest one's growth."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, model_name, num_batches, size)
        ranks = [context.Process(target=run_rank, args=(way, rank, *arguments)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        numbers = [Path(folder, f"rank-{rank}").read_text().split() for rank in range(world_size)]
    return max(float(seconds) for seconds, _ in numbers), max(int(growth) for _, growth in numbers) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/buffers.py --model vit_base_patch16_224 --batch-size 4 --ranks 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table, dated, to this file")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, found in results.items():
            found.append(measure(way, arguments.ranks, arguments.model, arguments.batches, arguments.batch_size))
    yardstick = statistics.median(seconds for seconds, _ in results["plain forward + backward"])
    rows = []
    for way, found in results.items():
        seconds, growth = (statistics.median(values) for values in zip(*found, strict=True))
        rows.append([way, f"{seconds:.2f}", f"{seconds / yardstick:.2f}", f"{growth:.0f}"])
    title = (
        f"{arguments.model}, {arguments.ranks} ranks, {arguments.batches} batches of {arguments.batch_size} images, "
        f"fp32, one thread a rank, median of {arguments.repeats}"
    )
    record(format_table(title, ["way", "s", "ratio", "MiB"], rows), arguments.out)


if __name__ == "__main__":
    main()
