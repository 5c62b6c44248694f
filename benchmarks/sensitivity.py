"""Stage 1's time and memory beside the ways of computing the same scores, as ratios to one forward and backward.

Every method runs in a process of its own, in turn, several times. Printed are medians: on a CPU of the process's CPU
time and of the growth of its resident memory, on a GPU of the time and of the growth of allocated memory. Peers score
the weights of the blocks' Linear layers, which each of them can; ours scores everything. Each method's result is
compared with the one-by-one loop.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import spt_dist  # isort: skip  # makes timm importable beside a CPU torch

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from _memory import peak_bytes, reset_peak
from _record import record
from spt_dist.tables import format_table

Scores = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
CHECKED = "blocks.0.mlp.fc1.weight"


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the Linear layers in the blocks, by the model's own names."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }


def plain(model: nn.Module, batches: list[Batch]) -> Scores:
    """Ordinary forward and backward passes: the yardstick, no scores."""
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad()
    return {}


def ours(model: nn.Module, batches: list[Batch]) -> Scores:
    """``estimate_sensitivity``, which scores all parameters outside the head."""
    scores = spt_dist.estimate_sensitivity(model, batches, F.cross_entropy)
    return {CHECKED: scores[CHECKED]}


def one_by_one(model: nn.Module, batches: list[Batch]) -> Scores:
    """A loop over samples with ordinary autograd."""
    weights = linear_weights(model)
    totals = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
    for images, labels in batches:
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            loss = F.cross_entropy(model(image), label)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for total, gradient in zip(totals.values(), gradients, strict=True):
                total.addcmul_(gradient, gradient)
    return {name: total.detach() for name, total in totals.items()}


def torch_func(model: nn.Module, batches: list[Batch], chunk_size: int | None = None) -> Scores:
    """``torch.func.vmap(grad)`` over each batch."""
    weights = {name: weight.detach() for name, weight in linear_weights(model).items()}

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (image[None],)), label[None])

    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for images, labels in batches:
        for some in torch.arange(len(images)).split(chunk_size or len(images)):
            gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images[some], labels[some])
            for name, gradient in gradients.items():
                totals[name] += gradient.square().sum(dim=0)
    return totals


def torch_func_chunked(model: nn.Module, batches: list[Batch]) -> Scores:
    """The same in chunks of two samples, to save memory."""
    return torch_func(model, batches, chunk_size=2)


def opacus(model: nn.Module, batches: list[Batch]) -> Scores:
    """Opacus' hooks, which keep every sample's gradient."""
    from opacus import GradSampleModule

    model.requires_grad_(False)
    weights = linear_weights(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    # It looks away in eval mode; the model has no dropout.
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False).train()
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for images, labels in batches:
        F.cross_entropy(wrapped(images), labels, reduction="sum").backward()
        for name, weight in weights.items():
            # Opacus pins the per-sample gradients on the parameters.
            totals[name] += getattr(weight, "grad_sample").square().sum(dim=0)  # noqa: B009
        wrapped.zero_grad(set_to_none=True)
    return {name: total.detach() for name, total in totals.items()}


def backpack(model: nn.Module, batches: list[Batch]) -> Scores:
    """BackPACK's ``SumGradSquared``, which contracts by opt_einsum."""
    import opt_einsum  # noqa: F401  # without it torch contracts in an order that takes hundreds of times as long
    from backpack import backpack as extended
    from backpack import extend
    from backpack.extensions import SumGradSquared

    model.requires_grad_(False)
    weights = linear_weights(model)
    for name, weight in weights.items():
        extend(model.get_submodule(name.removesuffix(".weight")))
        weight.requires_grad_(True)
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for images, labels in batches:
        with extended(SumGradSquared()):
            loss_fn(model(images), labels).backward()
        for name, weight in weights.items():
            totals[name] += getattr(weight, "sum_grad_squared")  # noqa: B009
        model.zero_grad()
    return {name: total.detach() for name, total in totals.items()}


METHODS: dict[str, Callable[[nn.Module, list[Batch]], Scores]] = {
    "forward + backward": plain,
    "spt_dist": ours,
    "one by one": one_by_one,
    "torch.func vmap": torch_func,
    "torch.func vmap, chunks of 2": torch_func_chunked,
    "opacus hooks": opacus,
    "BackPACK SumGradSquared": backpack,
}


def make_model(name: str, device: str) -> nn.Module:
    """A randomly initialised timm model, the same in every process."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=100).to(device)
    return model.eval()


def measure(name: str, model_name: str, batch_size: int, num_batches: int) -> dict[str, float]:
    """Run one method in this process: seconds, MiB of memory growth, and its error."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(model_name, device)
    batches = [
        (torch.randn(batch_size, 3, 224, 224, device=device), torch.randint(100, (batch_size,), device=device))
        for _ in range(num_batches)
    ]
    # Libraries load and allocate lazily: a small batch first settles that.
    plain(model, [(images[:1], labels[:1]) for images, labels in batches[:1]])
    if device == "cuda":
        METHODS[name](make_model(model_name, device), batches[:1])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, clock = torch.cuda.memory_allocated(), time.perf_counter
    else:
        before, clock = reset_peak(), time.process_time
    started = clock()
    scores = METHODS[name](model, batches)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()
    error = 0.0
    if scores:
        # On a fresh model: some methods leave hooks behind.
        wanted = one_by_one(make_model(model_name, device), batches)[CHECKED]
        error = ((scores[CHECKED] - wanted).abs().max() / wanted.max()).item()
    return {"seconds": seconds, "growth": (peak - before) / 2**20, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/sensitivity.py --model vit_base_patch16_224 --batch-size 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table, dated, to this file")
    parser.add_argument("--method", choices=METHODS, help="run one method once in this process and print JSON")
    arguments = parser.parse_args()
    sizes = (arguments.model, arguments.batch_size, arguments.batches)
    if arguments.method:
        print(json.dumps(measure(arguments.method, *sizes)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(arguments.repeats):
        for name in METHODS:
            command = [sys.executable, __file__, "--method", name, "--model", arguments.model]
            command += ["--batch-size", str(arguments.batch_size), "--batches", str(arguments.batches)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    yardstick = statistics.median(run["seconds"] for run in runs["forward + backward"])
    rows = []
    for name, results in runs.items():
        seconds = statistics.median(run["seconds"] for run in results)
        growth = statistics.median(run["growth"] for run in results)
        error = max(run["error"] for run in results)
        rows.append([name, f"{seconds:.2f}", f"{seconds / yardstick:.2f}", f"{growth:.0f}", f"{error:.0e}"])
    model, size, count = sizes
    title = f"{model}, {count} batches of {size} images, fp32, one thread, median of {arguments.repeats}"
    record(format_table(title, ["method", "s", "ratio", "MiB", "error"], rows), arguments.out)


if __name__ == "__main__":
    main()
