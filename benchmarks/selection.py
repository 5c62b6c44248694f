"""Choosing the most sensitive weights of sharded scores beside gathering them on one rank for ``torch.topk``.

Every size and number of ranks starts gloo ranks of one thread, which hold the scores of a ViT's weights: squares of
normal values, with a log-normal scale a tensor, a row and a column. The methods take turns on the same shards. Printed
are medians of the time of the slowest rank, also as a ratio to gathering, and over all ranks the largest number of
bytes written to sockets and the largest growth of resident memory.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from _memory import peak_bytes, reset_peak
from _record import record
from spt_dist.sensitivity.selection import count_selected, selected_positions, solve_threshold, top_tau
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, get_rank, shard_bounds, world_size
from spt_dist.tables import format_table

# Millions of weights -> name, width, blocks, patch size.
MODELS = {86: ("ViT-B/16", 768, 12, 16), 304: ("ViT-L/16", 1024, 24, 16), 632: ("ViT-H/14", 1280, 32, 14)}
GATHER = "gather + torch.topk"
# Bytes a score that gathering takes on all ranks together: the shards, the gathered scores, and torch.topk's pairs of
# a value and an index.
GATHER_BYTES = 4 + 4 + 16
LORA_RANK = 8


def vit_index(width: int, blocks: int, patch: int) -> FlatIndex:
    """Names and shapes of a ViT's weights at 224 x 224 pixels, q, k and v apart, without the head."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (width,),
        "pos_embed": ((224 // patch) ** 2 + 1, width),
        "patch_embed.proj": (width, 3 * patch * patch),
    }
    for block in range(blocks):
        shapes |= {f"blocks.{block}.norm{number}": (width,) for number in (1, 2)}
        shapes |= {f"blocks.{block}.attn.{name}": (width, width) for name in ("q", "k", "v", "proj")}
        shapes |= {f"blocks.{block}.mlp.fc1": (4 * width, width), f"blocks.{block}.mlp.fc2": (width, 4 * width)}
    shapes["norm"] = (width,)
    named = {f"{name}.weight": shape for name, shape in shapes.items()}
    named |= {f"{name}.bias": shape[:1] for name, shape in shapes.items() if name not in ("cls_token", "pos_embed")}
    return FlatIndex(tuple(named), tuple(named.values()))


def make_shard(index: FlatIndex) -> ScoreShard:
    """This rank's part of random scores."""
    start, stop = shard_bounds(index.total, world_size(), get_rank())
    shard = ScoreShard(index, start, torch.empty(stop - start))
    own = torch.Generator().manual_seed(get_rank())
    for place, part, first in shard.segments():
        generator = torch.Generator().manual_seed(place)
        shape = index.shapes[place]
        scales = [torch.randn(size, generator=generator).mul(0.5).exp() for size in (1, shape[0], *shape[1:])]
        values = shard.values[part].normal_(generator=own).square_().mul_(1e-8 * scales[0] ** 2)
        if len(shape) == 2:
            # A weight's gradient is a product of one factor of its row and one of its column.
            rows = torch.arange(first // shape[1], (first + len(values) - 1) // shape[1] + 1)
            scale = torch.outer(scales[1][rows], scales[2]).flatten()
            offset = first % shape[1]
            values *= scale[offset : offset + len(values)].square_()
    return shard


def lora_cost(shape: tuple[int, ...], count: int) -> int:
    """Trainable parameters of a tensor with ``count`` sensitive weights: LoRA, where that is not dearer."""
    return min(count, LORA_RANK * sum(shape)) if len(shape) == 2 else count


def find_threshold(shard: ScoreShard, budget: int) -> float:
    """``top_tau`` alone; returns the lowest score selected."""
    return float(torch.tensor(top_tau(shard, budget).bits, dtype=torch.int32).view(torch.float32))


def find_positions(shard: ScoreShard, budget: int) -> float:
    """``top_tau``, and on every rank the positions of what it selects."""
    threshold = top_tau(shard, budget)
    assert sum(map(len, selected_positions(shard, threshold, shard.index.names).values())) == budget
    return float(torch.tensor(threshold.bits, dtype=torch.int32).view(torch.float32))


def solve_budget(shard: ScoreShard, budget: int) -> None:
    """All that an allocation asks for: the threshold, the counts, and the positions of weights tuned one by one."""
    names, shapes = shard.index.names, shard.index.shapes

    def total(counts: Tensor) -> int:
        return sum(lora_cost(shape, count) for shape, count in zip(shapes, counts.tolist(), strict=True))

    threshold = solve_threshold(shard, total, budget)
    counts = count_selected(shard, threshold)
    assert 0.99 * budget < total(counts) <= budget
    each = zip(names, shapes, counts.tolist(), strict=True)
    selected_positions(shard, threshold, [name for name, shape, count in each if 0 < count == lora_cost(shape, count)])


def gather_and_topk(shard: ScoreShard, budget: int) -> float | None:
    """Every shard to the first rank, which sorts out the highest; returns the lowest score selected there."""
    length = -(-shard.index.total // world_size())
    mine = shard.values
    if len(mine) < length:
        mine = torch.nn.functional.pad(mine, (0, length - len(mine)))
    if get_rank() > 0:
        dist.gather(mine, dst=0)
        return None
    gathered = torch.empty(world_size() * length)
    dist.gather(mine, list(gathered.split(length)), dst=0)
    return gathered.topk(budget, sorted=False).values.min().item()


METHODS: dict[str, Callable[[ScoreShard, int], float | None]] = {
    "top_tau": find_threshold,
    "top_tau + positions": find_positions,
    "budget search": solve_budget,
    GATHER: gather_and_topk,
}


def sent_bytes() -> int:
    """Bytes that this process has written so far, to sockets and files."""
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if "wchar" in line)


def run_rank(rank: int, ranks: int, folder: str, size: int, budget: int, repeats: int, methods: list[str]) -> None:
    """Run every method on one rank, in turn; writes seconds, bytes sent and bytes of memory to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    shard = make_shard(vit_index(*MODELS[size][1:]))
    # The first collective opens the connections.
    dist.barrier()
    measured: dict[str, list[tuple[float, int, int]]] = {method: [] for method in methods}
    lowest = set()
    for _ in range(repeats):
        for method, results in measured.items():
            # Give back what earlier methods freed, or it would hide this one's memory.
            ctypes.CDLL(None).malloc_trim(0)
            dist.barrier()
            memory, sent, started = reset_peak(), sent_bytes(), time.perf_counter()
            lowest.add(METHODS[method](shard, budget))
            results.append((time.perf_counter() - started, sent_bytes() - sent, peak_bytes() - memory))
    assert len(lowest - {None}) == 1, f"the methods disagree: {lowest}"
    Path(folder, f"rank-{rank}").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, size: int, budget: int, repeats: int, methods: list[str]) -> dict[str, list[float]]:
    """Method -> median seconds of the slowest rank, most bytes sent and most bytes of memory."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, size, budget, repeats, methods)
        processes = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        results: list[dict[str, Any]] = [json.loads(Path(folder, f"rank-{rank}").read_text()) for rank in range(ranks)]
    medians = {}
    for method in methods:
        of_repeats = zip(*(result[method] for result in results), strict=True)
        largest = [[max(numbers) for numbers in zip(*ranks_alike, strict=True)] for ranks_alike in of_repeats]
        medians[method] = [statistics.median(numbers) for numbers in zip(*largest, strict=True)]
    return medians


def room_to_gather(size: int) -> bool:
    """Whether the machine has the memory that gathering takes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return vit_index(*MODELS[size][1:]).total * GATHER_BYTES < 0.95 * available


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/selection.py --sizes 86 304 632 --ranks 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, nargs="+", choices=MODELS, default=[86, 304], help="millions of scores")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--budget", type=int, default=400_000, help="trainable parameters, and the tau of top_tau")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table, dated, to this file")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for size in arguments.sizes:
        for ranks in arguments.ranks:
            methods = [method for method in METHODS if method != GATHER or room_to_gather(size)]
            medians = measure(ranks, size, arguments.budget, arguments.repeats, methods)
            for method in METHODS:
                row = [f"{MODELS[size][0]}, {size} M, {ranks} ranks", method]
                if method not in medians:
                    need = size * GATHER_BYTES / 1000
                    rows.append([*row, f"left out: needs {need:.0f} GB of memory", "", "", ""])
                    continue
                seconds, sent, memory = medians[method]
                ratio = f"{seconds / medians[GATHER][0]:.3f}" if GATHER in medians else ""
                rows.append([*row, f"{seconds:.2f}", ratio, f"{sent / 1e6:,.2f}", f"{memory / 2**20:,.0f}"])
    cores = len(os.sched_getaffinity(0))
    title = (
        f"the {arguments.budget:,} most sensitive weights, and a budget of as many trainable parameters: "
        f"median of {arguments.repeats}, {cores} cores"
    )
    record(format_table(title, ["scores", "method", "s", "ratio", "MB sent", "MiB"], rows), arguments.out)


if __name__ == "__main__":
    main()
