"""A training step of SPT beside plain LoRA and others: time, memory, bytes kept for the backward pass, size of a task.

Every method runs in a process of its own, in turn, several times. The plans are allocations that SPT's authors
published for a ViT-B/16 (--allocations DIR with lora/TASK.pth and adapter/TASK.pth, files of github.com/ziplab/SPT), or
made from the model's scores on random images, with the published alpha and beta and 0.45 % of the backbone as budget.
Plain LoRA is on q and v of every block, with the highest rank that trains no more than the SPT plan. SHiRA, which
forces rank * (in + out) single weights a layer, gets the plan's positions, filled up within their rows and columns;
"single weights" is ours with the same. Printed are medians: of CPU time and growth of resident memory on a CPU, of time
and allocated memory on a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import spt_dist  # isort: skip  # makes timm importable beside a CPU torch

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _memory import peak_bytes, reset_peak, saved_bytes
from _record import record
from spt_dist import Plan
from spt_dist.models.matrices import take_inventory
from spt_dist.tables import format_table
from spt_dist.tuning.methods import make_plan

YARDSTICK = "LoRA"
# A prepared model, and how its task is written to a folder or file.
Prepared = tuple[nn.Module, Callable[[Path], None]]


def prepare_plan(model: nn.Module, plan: Plan) -> Prepared:
    """Ours: any plan."""
    tuned = spt_dist.inject(model, plan)
    return tuned, partial(spt_dist.save_delta, tuned)


def prepare_peft_lora(model: nn.Module, plan: Plan) -> Prepared:
    """peft's LoRA on the fused projection of every block: as many parameters as on q and v."""
    from peft import LoraConfig, get_peft_model

    rank = lora_rank(model, plan)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"], modules_to_save=["head"])
    tuned = get_peft_model(model, config)
    return tuned, partial(_save_peft, tuned)


def prepare_shira(model: nn.Module, plan: Plan) -> Prepared:
    """peft's SHiRA with the positions of ``fill_up``."""
    from peft import ShiraConfig, get_peft_model

    filled = fill_up(model, plan)
    layers = {id(model.get_submodule(name).weight): positions for name, positions in filled.items()}

    def mask(layer: nn.Linear, rank: int, **_: Any) -> Tensor:
        chosen = torch.zeros(layer.weight.numel())
        chosen[layers[id(layer.weight)]] = 1
        return chosen.view_as(layer.weight)

    config = ShiraConfig(r=1, target_modules=list(filled), modules_to_save=["head"])
    config.mask_fn = mask  # type: ignore[assignment]
    tuned = get_peft_model(model, config)
    return tuned, partial(_save_peft, tuned)


def prepare_single_weights(model: nn.Module, plan: Plan) -> Prepared:
    """Ours: the positions of ``fill_up`` and no more."""
    sparse: dict[str, Tensor] = {}
    shapes = {}
    filled = fill_up(model, plan)
    for parameter in take_inventory(model).parameters:
        if parameter.module in filled and parameter.is_matrix:
            first = parameter.start * parameter.shape[1]
            positions = filled[parameter.module]
            inside = positions[(positions >= first) & (positions < first + parameter.numel)] - first
            sparse[parameter.name], shapes[parameter.name] = inside, parameter.shape
    return prepare_plan(model, Plan(sparse=sparse, shapes=shapes, head=plan.head))


def fill_up(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Layer -> flat positions of in + out single weights, those of the plan first; layers that have room for them."""
    filled: dict[str, list[Tensor]] = {}
    for parameter in take_inventory(model).parameters:
        if parameter.is_matrix and parameter.name in plan.sparse:
            first = parameter.start * parameter.shape[1]
            filled.setdefault(parameter.module, []).append(plan.sparse[parameter.name] + first)
    result = {}
    for name, parts in filled.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        chosen = torch.cat(parts)
        wanted = layer.in_features + layer.out_features
        rows, columns = (chosen // layer.in_features).unique(), (chosen % layer.in_features).unique()
        block = (rows[:, None] * layer.in_features + columns).flatten()
        others = block[~torch.isin(block, chosen)]
        if len(chosen) <= wanted <= len(block):
            result[name] = torch.cat([chosen, others[: wanted - len(chosen)]]).sort().values
    return result


def lora_rank(model: nn.Module, plan: Plan) -> int:
    """The highest rank on q and v that trains no more than the plan."""
    return plan.num_trainable // make_plan("lora", model, rank=1).num_trainable


METHODS: dict[str, Callable[[nn.Module, dict[str, Plan]], Prepared]] = {
    YARDSTICK: lambda model, plans: prepare_plan(model, make_plan("lora", model, rank=lora_rank(model, plans["lora"]))),
    "peft LoRA": lambda model, plans: prepare_peft_lora(model, plans["lora"]),
    "SPT-LoRA, structured only": lambda model, plans: prepare_plan(model, replace(plans["lora"], sparse={})),
    "SPT-LoRA": lambda model, plans: prepare_plan(model, plans["lora"]),
    "SPT-Adapter": lambda model, plans: prepare_plan(model, plans["adapter"]),
    "single weights": lambda model, plans: prepare_single_weights(model, plans["lora"]),
    "peft SHiRA": lambda model, plans: prepare_shira(model, plans["lora"]),
    "full": lambda model, plans: prepare_plan(model, make_plan("full", model)),
}


def load_plans(folder: Path | None, task: str, model: nn.Module) -> dict[str, Plan]:
    """The published LoRA and adapter plans of a task, or plans of random scores for the model."""
    if folder is not None:
        return {kind: Plan.from_spt_release(folder / kind / f"{task}.pth") for kind in ("lora", "adapter")}
    device = next(model.parameters()).device
    batch = torch.randn(8, 3, 224, 224, device=device), torch.randint(100, (8,), device=device)
    scores = spt_dist.estimate_sensitivity(model, [batch], F.cross_entropy)
    return {
        kind: spt_dist.allocate(scores, budget=0.0045, structured=kind, alpha=10.0, beta=5.0)
        for kind in ("lora", "adapter")
    }


def measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one method in this process."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = timm.create_model(arguments.model, num_classes=100).to(device)
    tuned, save = METHODS[name](model, load_plans(arguments.allocations, arguments.task, model))
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    images = torch.randn(arguments.batch_size, 3, 224, 224, device=device)
    labels = torch.randint(100, (arguments.batch_size,), device=device)

    def step() -> None:
        F.cross_entropy(tuned(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    tuned.train()
    step()
    saved = saved_bytes(tuned, lambda: F.cross_entropy(tuned(images), labels))
    seconds = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = reset_peak() if device == "cpu" else 0
    for _ in range(arguments.steps):
        started = _clock(device)
        step()
        seconds.append(_clock(device) - started)
    # On a CPU the weights, which all methods have, are not in it; on a GPU they are.
    growth = peak_bytes() - before if device == "cpu" else torch.cuda.max_memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "task.safetensors"))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    head = sum(parameter.numel() for name, parameter in tuned.named_parameters() if _is_trained_head(name, parameter))
    return {
        "trained": sum(parameter.numel() for parameter in parameters) - head,
        "seconds": statistics.median(seconds),
        "growth": growth / 2**20,
        "saved": saved / 2**20,
        "file": size / 2**20,
    }


def _is_trained_head(name: str, parameter: nn.Parameter) -> bool:
    # peft keeps the head's old values beside the trained ones.
    return "head." in name and parameter.requires_grad


def _save_peft(tuned: Any, path: Path) -> None:
    tuned.save_pretrained(path.parent)


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/finetune_step.py --allocations spt_allocations --task cifar_0.4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="steps of one process, of which the median is taken")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each method")
    parser.add_argument("--allocations", type=Path, help="folder with published allocations")
    parser.add_argument("--task", default="cifar_0.4", help="which of them")
    parser.add_argument("--out", type=Path, help="also write the table, dated, to this file")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--once", action="store_true", help="run the one method in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(measure(arguments.methods[0], arguments)))
        return
    methods = list(dict.fromkeys([YARDSTICK, *arguments.methods]))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for _ in range(arguments.repeats):
        for name in methods:
            command = [sys.executable, *sys.argv, "--once", "--methods", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    rows = [_row(name, values, medians[YARDSTICK]) for name, values in medians.items()]
    columns = ["method", "trained", "s", "ratio", "peak MiB", "ratio", "kept MiB", "ratio", "file MiB"]
    plans = f"{arguments.task} (published)" if arguments.allocations else "made from scores"
    title = (
        f"{arguments.model}, batch of {arguments.batch_size}, fp32, plans: {plans}; median of {arguments.repeats} "
        f"processes of {arguments.steps} steps"
    )
    record(format_table(title, columns, rows), arguments.out)


def _row(name: str, values: dict[str, float], yardstick: dict[str, float]) -> list[str]:
    cells = [name, f"{values['trained']:,.0f}"]
    for key, digits in (("seconds", 2), ("growth", 0), ("saved", 0)):
        cells += [f"{values[key]:,.{digits}f}", f"{values[key] / yardstick[key]:.3f}"]
    return [*cells, f"{values['file']:.2f}"]


if __name__ == "__main__":
    main()
