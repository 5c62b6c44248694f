"""Which backbone fits which memory under which engine, from the dry run's arithmetic, and how near that comes."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import spt_dist  # noqa: F401  # isort: skip  # makes timm importable beside a CPU torch

import timm
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from _memory import peak_bytes, reset_peak
from _ranks import run_ranks  # type: ignore[import-not-found]
from _training import ENGINES, make_trainer  # type: ignore[import-not-found]
from spt_dist.data.loader import load_batches
from spt_dist.sections import ModelConfig, RunConfig, SensitivityConfig, TrainConfig
from spt_dist.tables import format_table
from spt_dist.training.dry_run import plan_run
from spt_dist.tuning.methods import make_plan

GIB = 2**30
BATCH_SIZE, NUM_CLASSES, IMAGE_SIZE = 8, 10, 224
MODELS = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
    "ViT-G/14": "vit_gigantic_patch14_224",
}
MEMORIES = (16, 24, 40, 80)
# Name -> engine and number of ranks, where they differ by more than some MB of what is trained.
ROWS = {
    "any, 1 rank": ("ddp", 1),
    "ddp, ZeRO-0 to 2, several ranks": ("ddp", 8),
    "ZeRO-3, 8 ranks": ("zero3", 8),
    "ZeRO-3, 64 ranks": ("zero3", 64),
    "fsdp, 8 ranks": ("fsdp", 8),
    "fsdp, 64 ranks": ("fsdp", 64),
}
SPT: dict[str, Any] = {"type": "spt", "budget": 0.0045, "structured": "lora"}
LORA: dict[str, Any] = {"type": "lora", "rank": 8}
MEASURED_MODEL, MEASURED_RANKS, MEASURED_ENGINES = "ViT-B/16", 2, ("ddp", "fsdp", "zero3")


def find_needed(model: str, engine: str, ranks: int, method: dict[str, Any]) -> dict[str, int]:
    """Part of a run -> bytes that a rank needs."""
    config = RunConfig(
        model=ModelConfig(name=MODELS[model], num_classes=NUM_CLASSES),
        data={"type": "digits", "image_size": IMAGE_SIZE},
        method=method,
        train=TrainConfig(epochs=1, batch_size=BATCH_SIZE * ranks),
        sensitivity=SensitivityConfig(batch_size=BATCH_SIZE),
        engine=ENGINES[engine],
    )
    return {phase: sum(parts.values()) for phase, parts in plan_run(config, ranks).phases.items()}


def grow(engine: str) -> tuple[int, int]:
    """Bytes by which this rank grows from before the model is built until it trains, at most and once it is built."""
    torch.manual_seed(dist.get_rank())
    samples = torch.randn(MEASURED_RANKS * BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    labels = torch.randint(NUM_CLASSES, (len(samples),))
    before = reset_peak()
    name = MODELS[MEASURED_MODEL]
    with torch.device("meta"):
        plan = make_plan(LORA["type"], timm.create_model(name, num_classes=NUM_CLASSES), rank=LORA["rank"])
    trainer = make_trainer(name, engine, plan, TensorDataset(samples, labels), NUM_CLASSES)
    batch = next(iter(load_batches(trainer.task.train, trainer.batches.epoch(), trainer.device)))
    # DeepSpeed knows in which order it needs the weights after two steps, AdamW has its moments after one.
    for _ in range(2):
        trainer.train_step(batch, 1e-3)
    dist.barrier()
    at_rest = reset_peak() - before
    trainer.train_step(batch, 1e-3)
    return peak_bytes() - before, at_rest


def largest_tables() -> str:
    """Both tables as text."""
    cases = [(model, *row, SPT) for row in ROWS.values() for model in MODELS]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(find_needed, *zip(*cases, strict=True)))
    rows = []
    for number, name in enumerate(ROWS):
        phases = dict(zip(MODELS, found[number * len(MODELS) :], strict=False))
        fitting = [[model for model in MODELS if max(phases[model].values()) <= size * GIB] for size in MEMORIES]
        cells = [
            f"{phases[model]['scoring'] / GIB:,.1f} / {phases[model]['training pass'] / GIB:,.1f}" for model in MODELS
        ]
        rows.append([name, *(models[-1] if models else "none" for models in fitting), *cells])
    title = (
        f"the largest backbone that fits by the dry run's arithmetic: SPT-LoRA, {SPT['budget']:.2%} trained, scoring\n"
        f"included, fp32, {BATCH_SIZE} images of {IMAGE_SIZE} x {IMAGE_SIZE} a rank; and GiB to score and to train"
    )
    columns = ["", *(f"{memory} GiB" for memory in MEMORIES), *MODELS]
    return f"{format_table(title, columns, rows)}\n\n{_measured_table()}"


def _measured_table() -> str:
    rows = []
    for engine in MEASURED_ENGINES:
        found = max(run_ranks(grow, MEASURED_RANKS, engine))
        estimate = max(find_needed(MEASURED_MODEL, engine, MEASURED_RANKS, LORA).values())
        rows.append([engine, *(f"{size / GIB:.2f}" for size in (estimate, *found)), f"{estimate / found[0]:.2f}"])
    title = (
        f"the estimate beside what a process of {MEASURED_RANKS} really grows by: {MEASURED_MODEL}, LoRA of rank "
        f"{LORA['rank']}, {BATCH_SIZE} images a rank, GiB"
    )
    return format_table(title, ["engine", "estimate", "peak", "between steps", "estimate/peak"], rows)
