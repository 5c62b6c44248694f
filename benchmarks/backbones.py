"""Full-size backbones through all stages: from a file of weights to a merged model, beside ordinary passes.

The weights are random, of the shapes of the configs in configs/_base_/models, and lie in a file as PyTorch writes them.
Each backbone gets new processes with a gloo group and one thread each. Every sample is one image of noise.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import spt_dist  # isort: skip  # makes timm importable beside a CPU torch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from _memory import peak_bytes, reset_peak
from _ranks import run_ranks  # type: ignore[import-not-found]
from _record import record
from spt_dist.config import read_values
from spt_dist.models.classifier import build_classifier, create_model
from spt_dist.sensitivity.coverage import find_image_shape
from spt_dist.tables import format_table

CONFIGS = Path(__file__).parents[1] / "configs" / "_base_" / "models"
GIB = 2**30
NUM_CLASSES, BUDGET = 10, 0.0045
COLUMNS = [
    "backbone",
    "ranks",
    "weights, M",
    "trained",
    "of the backbone",
    "load, s",
    "load, GiB / weights",
    "score / ordinary",
    "score, GiB / weights",
    "step / ordinary",
    "task file, MB",
    "merged differs by",
]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=["vit-b16_in21k"], help="configs in configs/_base_/models")
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    parser.add_argument("--samples", type=int, default=4, help="images a rank")
    parser.add_argument("--repeats", type=int, default=3, help="passes that the times are medians of")
    parser.add_argument("--out", type=Path, help="file to write the table to as well")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.backbones:
        settings = read_values(CONFIGS / f"{name}.py")["model"]
        with tempfile.TemporaryDirectory() as folder:
            found = run_ranks(whole_way, arguments.ranks, settings, folder, arguments.samples, arguments.repeats)
        rows.append([name, str(arguments.ranks), *found[0]])
    title = (
        f"all stages, SPT-LoRA with {BUDGET:.2%} of the backbone, {arguments.samples} images a rank, fp32; ordinary: "
        "forward and backward\nover the same images with gradients of all weights; GiB: growth of a rank's resident "
        "memory beside the weights' size"
    )
    record(format_table(title, COLUMNS, rows), arguments.out)


def whole_way(settings: dict[str, Any], folder: str, num_samples: int, repeats: int) -> list[str]:
    """One rank's part; the cells of the table after the first two."""
    path, task = Path(folder, "weights.pth"), Path(folder, "task.safetensors")
    if dist.get_rank() == 0:
        torch.save({"model": draw(settings)}, path)
    dist.barrier()
    memory: dict[str, int] = {}
    seconds: dict[str, float] = {}
    with measured("load", memory, seconds):
        model = build_classifier(settings["name"], NUM_CLASSES, settings.get("kwargs"), str(path)).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    images = torch.randn(num_samples, *find_image_shape(model, settings.get("kwargs", {})))
    batch = images, torch.randint(NUM_CLASSES, (num_samples,))

    # All together, or one rank would run alone for a while.
    ordinary = median_seconds(lambda: ordinary_pass(model, batch), repeats)
    scoring = median_seconds(lambda: spt_dist.estimate_sensitivity(model, [batch], F.cross_entropy), repeats)
    with measured("score", memory, seconds):
        scores = spt_dist.estimate_sensitivity(model, [batch], F.cross_entropy)
    plan = spt_dist.allocate(scores, budget=BUDGET, alpha=10.0, beta=5.0)
    del scores
    tuned = spt_dist.inject(model, plan)
    optimizer = torch.optim.AdamW([parameter for _, parameter in spt_dist.trainable_parameters(tuned)], lr=1e-3)
    stepping = median_seconds(lambda: step(tuned, batch, optimizer), repeats)
    cells = []
    if dist.get_rank() == 0:
        spt_dist.save_delta(tuned, task)
        cells = [f"{task.stat().st_size / 1e6:.1f}", f"{merge_error(tuned, images):.1e}"]
    dist.barrier()
    return [
        f"{size / 1e6:,.1f}",
        f"{plan.num_trainable:,}",
        f"{plan.num_trainable / plan.backbone_size:.3%}",
        f"{seconds['load']:.1f}",
        f"{memory['load'] / (4 * size):.2f}",
        f"{scoring / ordinary:.2f}",
        f"{memory['score'] / (4 * size):.2f}",
        f"{stepping / ordinary:.2f}",
        *cells,
    ]


def draw(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights of a backbone that differ from its initialisation in every tensor."""
    state = create_model(settings["name"], NUM_CLASSES, settings.get("kwargs"), torch.device("cpu")).state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.add_(torch.randn_like(value), alpha=0.02 / math.sqrt(max(1, value.ndim)))
    return state


def ordinary_pass(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Forward and backward of the mean loss, with the gradients of all weights."""
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    model.zero_grad()


def step(tuned: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One step of training on one rank's samples."""
    F.cross_entropy(tuned(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def merge_error(tuned: nn.Module, images: Tensor) -> float:
    """The largest difference of the merged model's outputs, relative to the largest output."""
    wanted = tuned(images)
    return float((spt_dist.merge(tuned)(images) - wanted).abs().max() / wanted.abs().max())


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one call on this rank, median of several after a first one."""
    run()
    found = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


@contextmanager
def measured(what: str, memory: dict[str, int], seconds: dict[str, float]) -> Iterator[None]:
    """Note a block's growth of resident memory at its peak, and its time."""
    before, started = reset_peak(), time.perf_counter()
    yield
    memory[what], seconds[what] = peak_bytes() - before, time.perf_counter() - started


if __name__ == "__main__":
    main()
