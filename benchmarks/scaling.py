"""What the engines cost on several ranks: throughput, bytes on the wire, and the largest backbone that fits.

Real gloo ranks of one thread each train a backbone with an SPT-LoRA plan made from its scores on random images.
Printed are images a second over all ranks, from the median time of a step of the slowest rank; its CPU time, which
others on the machine disturb less; and what goes over the wire in a step. A payload is the whole tensor that a
collective is about; from it follows what a rank sends in a ring, as NCCL does it, and what it sends with gloo, which
is compared with the bytes that the loopback device counts. After that: full fine-tuning's traffic on the smallest
number of several ranks, that of a scoring pass, and a model of the former on paper for 8 to 1,024 GPUs.

--largest prints instead which backbone fits which memory, and the estimate's error where it can be measured.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import spt_dist  # isort: skip  # makes timm importable beside a CPU torch

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from _largest import largest_tables  # type: ignore[import-not-found]
from _paper import Sizes, draw_traffic, paper_table, payloads, sizes_of  # type: ignore[import-not-found]
from _ranks import run_ranks  # type: ignore[import-not-found]
from _record import record
from _traffic import ALL_GATHER, ALL_REDUCE, REDUCE, REDUCE_SCATTER, Traffic, isolate, loopback_bytes  # type: ignore[import-not-found]
from _training import ENGINES, make_trainer  # type: ignore[import-not-found]
from spt_dist import Plan
from spt_dist.data.loader import load_batches
from spt_dist.tables import format_table
from spt_dist.tuning.methods import make_plan

NUM_CLASSES = 100
BUDGET = 0.0045
WARMUP = 2
MB = 1e6


@dataclass(frozen=True)
class Case:
    """What one set of ranks trains; ``plan`` is a file, or ``None`` for full fine-tuning."""

    model: str
    engine: str
    plan: str | None
    batch_size: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """What came of it on one rank: seconds of each step, on the clock and of the CPU, and bytes of one more."""

    seconds: list[float]
    cpu_seconds: list[float]
    payload: dict[str, int]
    ring: float
    gloo: float
    loopback: float


def train(case: Case) -> Measured:
    """Run one case on this rank."""
    model = timm.create_model(case.model, num_classes=NUM_CLASSES)
    plan = make_plan("full", model) if case.plan is None else Plan.load(case.plan)
    ranks = dist.get_world_size()
    size = ranks * case.batch_size
    samples = TensorDataset(torch.randn(size, 3, 224, 224), torch.randint(NUM_CLASSES, (size,)))
    trainer = make_trainer(case.model, case.engine, plan, samples, NUM_CLASSES)
    batch = next(iter(load_batches(samples, trainer.batches.epoch(), trainer.device)))
    seconds, cpu_seconds = [], []
    for _ in range(WARMUP + case.steps):
        dist.barrier()
        started, used = time.perf_counter(), time.process_time()
        trainer.train_step(batch, 1e-3)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - used)
    with Counted() as counted:
        trainer.train_step(batch, 1e-3)
    return counted.result(seconds[WARMUP:], cpu_seconds[WARMUP:])


def score(model_name: str, shard_sums: bool) -> Measured:
    """One scoring pass over two images a rank."""
    model = timm.create_model(model_name, num_classes=NUM_CLASSES)
    batches = [(torch.randn(1, 3, 224, 224), torch.randint(NUM_CLASSES, (1,))) for _ in range(2)]
    with Counted() as counted:
        spt_dist.estimate_sensitivity(model, batches, F.cross_entropy, shard_sums=shard_sums)
    return counted.result([], [])


class Counted:
    """Both ways of counting what the block sends: from the collectives, and on the loopback device."""

    def __enter__(self) -> "Counted":
        self._traffic = Traffic()
        # The first collective opens connections.
        dist.barrier()
        self._before = loopback_bytes()
        dist.barrier()
        self._traffic.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._traffic.__exit__(*error)
        dist.barrier()
        self._loopback = (loopback_bytes() - self._before) / dist.get_world_size()
        dist.barrier()

    def result(self, seconds: list[float], cpu_seconds: list[float]) -> Measured:
        """What was counted; with the seconds of the steps before."""
        traffic = self._traffic
        return Measured(seconds, cpu_seconds, dict(traffic.payload), traffic.ring, traffic.gloo, self._loopback)


def throughput_table(cases: dict[tuple[str, int], list[Measured]], batch_size: int, title: str) -> str:
    """Images a second of every engine and number of ranks, and CPU seconds of one rank in a step."""
    speeds, used = {}, {}
    for case, results in cases.items():
        steps = [max(times) for times in zip(*(result.seconds for result in results), strict=True)]
        speeds[case] = case[1] * batch_size / statistics.median(steps)
        used[case] = max(statistics.median(result.cpu_seconds) for result in results)
    rows = []
    for case, speed in speeds.items():
        engine, ranks = case
        cells = [f"{speed:.2f}", *(f"{speed / speeds[yardstick]:.2f}" for yardstick in (("ddp", ranks), (engine, 1)))]
        cells += [f"{used[case]:.2f}", f"{used[case] / used['ddp', ranks]:.2f}"]
        rows.append([f"{engine}, {ranks} ranks" if ranks > 1 else f"{engine}, 1 rank", *cells])
    return format_table(title, ["engine", "images/s", "to ddp", "to 1 rank", "CPU s", "to ddp"], rows)


def traffic_table(
    title: str, cases: dict[tuple[str, int], list[Measured]], isolated: bool, predicted: dict[tuple[str, int], int]
) -> str:
    """MB of payloads by kind, MB that a rank sends, and what the loopback device says about it."""
    kinds = [
        kind
        for kind in (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, REDUCE)
        if any(kind in results[0].payload for results in cases.values())
    ]
    rows = []
    for (name, ranks), results in cases.items():
        if ranks == 1:
            continue
        found = results[0]
        cells = [f"{found.payload.get(kind, 0) / MB:,.2f}" for kind in kinds]
        if predicted:
            cells.append(f"{sum(found.payload.values()) / predicted[name, ranks]:.4f}")
        cells += [f"{found.ring / MB:,.2f}", f"{found.gloo / MB:,.2f}"]
        loopback = max(result.loopback for result in results)
        cells += [f"{loopback / MB:,.2f}", f"{found.gloo / loopback:.3f}"] if isolated else ["", ""]
        rows.append([f"{name}, {ranks} ranks", *cells])
    columns = ["", *kinds, *(["to formula"] if predicted else []), "ring", "gloo", "loopback", "gloo/loopback"]
    return format_table(title, columns, rows)


def make_spt_plan(model_name: str) -> Plan:
    """The plan from scores on random images."""
    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=NUM_CLASSES)
    batch = torch.randn(4, 3, 224, 224), torch.randint(NUM_CLASSES, (4,))
    scores = spt_dist.estimate_sensitivity(model, [batch], F.cross_entropy)
    return spt_dist.allocate(scores, budget=BUDGET, structured="lora", alpha=10.0, beta=5.0)


def measure_all(arguments: argparse.Namespace, isolated: bool) -> str:
    """Everything but --largest, as text; draws the picture."""
    model_name, engines = arguments.model, arguments.engines
    plan = make_spt_plan(model_name)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/plan.safetensors"
        plan.save(path)
        tuned_cases: dict[tuple[str, int], list[Measured]] = {}
        full_cases: dict[tuple[str, int], list[Measured]] = {}
        scoring: dict[tuple[str, int], list[Measured]] = {}
        for ranks in arguments.ranks:
            for engine in engines:
                case = Case(model_name, engine, path, arguments.batch_size, arguments.steps)
                tuned_cases[engine, ranks] = run_ranks(train, ranks, case)
                if ranks > 1 and not any(other < ranks for _, other in full_cases):
                    full_cases[engine, ranks] = run_ranks(train, ranks, Case(model_name, engine, None, 1, 0))
            if ranks > 1:
                for way, shard_sums in (("whole sums", False), ("sums in parts", True)):
                    scoring[way, ranks] = run_ranks(score, ranks, model_name, shard_sums)

    models = {
        model_name: sizes_of(_on_meta(model_name), plan.num_trainable),
        arguments.paper_model: sizes_of(_on_meta(arguments.paper_model), BUDGET),
    }
    tuned, full = models[model_name]
    sizes = f"{model_name}, {tuned.trained:,} of {full.trained:,} parameters trained, fp32"
    meaning = (
        "MB of one rank and step: payloads by kind, their sum over the formula's; sent in rings, and by gloo; sent "
        "over the loopback device, and how much of that the count explains"
    )
    texts = [
        throughput_table(
            tuned_cases,
            arguments.batch_size,
            f"{sizes}; {arguments.batch_size} images a rank, one thread a rank, median of {arguments.steps} steps",
        ),
        traffic_table(f"{sizes}\n{meaning}", tuned_cases, isolated, _predict(tuned_cases, tuned)),
        traffic_table(
            f"{model_name}, all parameters trained\n{meaning}", full_cases, isolated, _predict(full_cases, full)
        ),
        traffic_table(f"{model_name}, a scoring pass: MB of one rank, as above", scoring, isolated, {}),
    ]
    texts += [paper_table(name, *pair) for name, pair in models.items()]
    if arguments.picture is not None:
        marks = {(engine, False, ranks): found[0].ring for (engine, ranks), found in tuned_cases.items() if ranks > 1}
        marks |= {(engine, True, ranks): found[0].ring for (engine, ranks), found in full_cases.items()}
        draw_traffic(models, {model_name: marks}, arguments.picture)
    return "\n\n".join(texts)


def _on_meta(model_name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(model_name, num_classes=NUM_CLASSES)
    return model


def _predict(cases: dict[tuple[str, int], list[Measured]], sizes: Sizes) -> dict[tuple[str, int], int]:
    return {(engine, ranks): sum(payloads(sizes, engine, ranks).values()) for engine, ranks in cases}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/scaling.py --ranks 1 2 --engines ddp fsdp zero3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batch-size", type=int, default=2, help="images of one rank in a step")
    parser.add_argument("--steps", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--paper-model", default="vit_huge_patch14_224", help="of the second table on paper")
    parser.add_argument("--picture", type=Path, help="draw the traffic on paper into this file")
    parser.add_argument("--largest", action="store_true", help="print which backbones fit, and nothing else")
    parser.add_argument("--out", type=Path, help="also write the tables, dated, to this file")
    isolated = isolate()
    arguments = parser.parse_args()
    # What they are compared with.
    arguments.engines = list(dict.fromkeys(["ddp", *arguments.engines]))
    arguments.ranks = sorted({1, *arguments.ranks})
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ranks give back at once what they free, so that their memory is what they use.
    if arguments.largest:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    record(largest_tables() if arguments.largest else measure_all(arguments, isolated), arguments.out)


if __name__ == "__main__":
    main()
