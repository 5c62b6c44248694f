"""Many tasks over one ViT-B in memory, beside a tuned model and beside a merged model for each of them.

The backbone is random, and so are the trained values; which weights the tasks tune is read from allocations that SPT's
authors published (``--plans``), or drawn at random in their manner. The ways take turns, after a first round that
isn't counted; printed are medians, and megabytes of the tensors that a way keeps, each storage once.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import spt_dist  # isort: skip  # makes timm importable beside a CPU torch

import timm
import torch
from torch import Tensor, nn

from _record import record
from spt_dist.models.matrices import take_inventory
from spt_dist.tables import format_table
from spt_dist.tuning.multitask.bank import TaskBank

MODEL = "vit_base_patch16_224"
BANK, TUNED, MERGED = "TaskBank", "a tuned model each", "a merged model each"
# Of the published allocations of 0.4 M parameters, about: tensors tuned by LoRA modules, whole, and by single weights,
# and the shares of rows, columns and of what lies on both that these touch.
NUM_MODULES, NUM_VECTORS, NUM_SPARSE = 14, 70, 45
ROWS, COLUMNS, CHOSEN = 0.2, 0.05, 0.1


def draw_plan(model: nn.Module, seed: int) -> spt_dist.Plan:
    """A random plan with about 0.4 M trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    inventory = take_inventory(model)
    known = {parameter.name: parameter for parameter in inventory.parameters if parameter.name.startswith("blocks")}

    def draw(names: list[str], count: int) -> list[str]:
        return [names[place] for place in torch.randperm(len(names), generator=generator)[:count].tolist()]

    drawn = draw([name for name in known if known[name].is_matrix], NUM_MODULES + NUM_SPARSE)
    vectors = draw([name for name in known if not known[name].is_matrix], NUM_VECTORS)
    sparse = {}
    for name in drawn[NUM_MODULES:]:
        touched = torch.outer(
            *(
                torch.rand(size, generator=generator) < share
                for size, share in zip(known[name].shape, (ROWS, COLUMNS), strict=True)
            )
        )
        sparse[name] = (touched & (torch.rand(touched.shape, generator=generator) < CHOSEN)).flatten().nonzero()[:, 0]
    tokens = {name: tuple(model.get_parameter(name).shape) for name in inventory.always_tuned}
    return spt_dist.Plan(
        matrices=dict.fromkeys(drawn[:NUM_MODULES], "lora"),
        vectors=vectors,
        sparse=sparse,
        parameters=inventory.always_tuned,
        head=inventory.head,
        shapes={name: known[name].shape for name in [*drawn, *vectors]} | tokens,
        backbone_size=inventory.backbone_size,
    )


def write_task(backbone: nn.Module, plan: spt_dist.Plan, seed: int, path: Path) -> None:
    """A task file for the plan, with random values, and with a number of classes of its own."""
    torch.manual_seed(seed)
    tuned = copy.deepcopy(backbone)
    tuned.reset_classifier(10 + seed)  # type: ignore[operator]  # timm's models have it
    spt_dist.inject(tuned, plan)
    for _, parameter in spt_dist.trainable_parameters(tuned):
        parameter.data += 0.01 * torch.randn_like(parameter)
    spt_dist.save_delta(tuned, path)


def measure(runs: dict[str, dict[str, Callable[[], object]]], repeats: int) -> dict[tuple[str, str], float]:
    """``(what, way)`` -> median of the seconds, all of them taking turns."""
    flat = {(what, way): run for what, ways in runs.items() for way, run in ways.items()}
    found: dict[tuple[str, str], list[float]] = {key: [] for key in flat}
    for _ in range(repeats + 1):
        for key, run in flat.items():
            started = time.perf_counter()
            run()
            found[key].append(time.perf_counter() - started)
    return {key: statistics.median(values[1:]) for key, values in found.items()}


def runs_of(
    bank: TaskBank, models: dict[str, list[nn.Module]], paths: list[Path], images: Tensor
) -> dict[str, dict[str, Callable[[], object]]]:
    """What is measured -> way -> what to run for it."""
    tasks = [f"task {place % len(paths)}" for place in range(len(images))]

    def add() -> None:
        bank.add("another", paths[0])
        bank.remove("another")

    def load() -> nn.Module:
        return spt_dist.load_delta(copy.deepcopy(bank.backbone), paths[0])

    def one_by_one(models: list[nn.Module]) -> list[Tensor]:
        return [model(images[place :: len(models)]) for place, model in enumerate(models)]

    return {
        "load a task": {BANK: add, TUNED: load, MERGED: lambda: spt_dist.merge(load())},
        "switch tasks": {BANK: lambda: bank.switch("task 0")},
        "batch of one task": {BANK: lambda: bank(images)}
        | {way: partial(some[0], images) for way, some in models.items()},
        "batch of all tasks": {BANK: lambda: bank(images, tasks)}
        | {way: partial(one_by_one, some) for way, some in models.items()},
    }


def megabytes(modules: Iterable[nn.Module]) -> float:
    """Of parameters and buffers, each storage once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/multitask.py --plans cifar_0.4.pth svhn_0.4.pth --batch-size 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plans", type=Path, nargs="+", help="published allocations, a task each; default: 4 drawn")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the table, dated, to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    backbone = timm.create_model(MODEL, num_classes=10).eval()
    plans = [spt_dist.Plan.from_spt_release(path) for path in arguments.plans or ()]
    plans = plans or [draw_plan(backbone, seed) for seed in range(4)]
    images = torch.randn(arguments.batch_size, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = [Path(folder, f"{place}.safetensors") for place in range(len(plans))]
        bank = TaskBank(backbone)
        for place, (plan, path) in enumerate(zip(plans, paths, strict=True)):
            write_task(backbone, plan, place, path)
            bank.add(f"task {place}", path)
        tuned = [spt_dist.load_delta(copy.deepcopy(backbone), path) for path in paths]
        models = {TUNED: tuned, MERGED: [spt_dist.merge(model) for model in tuned]}
        medians = measure(runs_of(bank, models, paths, images), arguments.repeats)
    kept = {BANK: megabytes([bank])} | {way: megabytes(some) for way, some in models.items()}
    rows = []
    for (what, way), median in medians.items():
        ratio = f"{median / medians[what, TUNED]:.2f}" if (what, TUNED) in medians else ""
        rows.append([what, way, f"{median:.2e}" if median < 1e-3 else f"{median:.3f}", ratio, f"{kept[way]:,.0f}"])
    size = sum(plan.num_trainable for plan in plans) / len(plans) / 1e6
    title = (
        f"{MODEL}, {len(plans)} tasks of {size:.2f} M trainable parameters, batches of {len(images)}, fp32, "
        f"{arguments.threads} thread(s), median of {arguments.repeats}, {len(os.sched_getaffinity(0))} cores"
    )
    record(format_table(title, ["what", "way", "s", "ratio", "MB"], rows), arguments.out)


if __name__ == "__main__":
    main()
