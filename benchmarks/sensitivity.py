"""Stage 1's time and memory beside the ways of computing the same scores, as ratios to one forward and backward.

Every method runs in a process of its own, in turn, several times; printed are medians of the processes' CPU time and of
the growth of their resident memory. Scores are those of the Linear layers' weights, which every peer can compute, and
each method's result is compared with the one-by-one loop.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import spt_dist  # isort: skip  # makes timm importable beside a CPU torch

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from spt_dist.tables import format_table

Scores = dict[str, Tensor]
CHECKED = "blocks.0.mlp.fc1.weight"


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the Linear layers in the blocks, by the model's own names."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }


def plain(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """One ordinary forward and backward: the yardstick, no scores."""
    F.cross_entropy(model(images), labels).backward()
    return {}


def ours(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """``estimate_sensitivity``, which scores biases and norms too."""
    scores = spt_dist.estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    return {CHECKED: scores[CHECKED]}


def one_by_one(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """A loop over samples with ordinary autograd."""
    weights = linear_weights(model)
    totals = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        loss = F.cross_entropy(model(image), label)
        for total, gradient in zip(totals.values(), torch.autograd.grad(loss, list(weights.values())), strict=True):
            total += gradient.square()
    return {name: total.detach() for name, total in totals.items()}


def torch_func(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """``torch.func.vmap(grad)`` over the batch."""
    weights = {name: weight.detach() for name, weight in linear_weights(model).items()}

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (image[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
    return {name: gradient.square().sum(dim=0) for name, gradient in gradients.items()}


def opacus(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Opacus' hooks, which keep every sample's gradient."""
    from opacus import GradSampleModule

    model.requires_grad_(False)
    for weight in linear_weights(model).values():
        weight.requires_grad_(True)
    # It looks away in eval mode; the model has no dropout.
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False).train()
    F.cross_entropy(wrapped(images), labels, reduction="sum").backward()
    # Opacus pins the per-sample gradients on the parameters.
    gradients = {name: getattr(weight, "grad_sample") for name, weight in linear_weights(model).items()}  # noqa: B009
    return {name: gradient.square().sum(dim=0) for name, gradient in gradients.items()}


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor], Scores]] = {
    "forward + backward": plain,
    "spt_dist": ours,
    "one by one": one_by_one,
    "torch.func vmap": torch_func,
    "opacus hooks": opacus,
}


def make_model(name: str) -> nn.Module:
    """A randomly initialised timm model, the same in every process."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=100)
    return model.eval()


def measure(name: str, model_name: str, batch_size: int) -> dict[str, float]:
    """Run one method in this process: seconds of CPU time, MiB of memory growth, and its error."""
    torch.set_num_threads(1)
    model = make_model(model_name)
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(100, (batch_size,))
    # Opacus replaces layers and others allocate lazily: a small batch first, on the same model, settles both.
    plain(model, images[:1], labels[:1])
    model.zero_grad()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    scores = METHODS[name](model, images, labels)
    seconds = time.process_time() - started
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    error = 0.0
    if scores:
        # On a fresh model: some methods leave hooks behind.
        wanted = one_by_one(make_model(model_name), images, labels)[CHECKED]
        error = ((scores[CHECKED] - wanted).abs().max() / wanted.max()).item()
    return {"seconds": seconds, "growth": growth, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/sensitivity.py --model vit_small_patch16_224 --batch-size 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, help="run one method once in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.method:
        print(json.dumps(measure(arguments.method, arguments.model, arguments.batch_size)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(arguments.repeats):
        for name in METHODS:
            command = [sys.executable, __file__, "--method", name, "--model", arguments.model]
            command += ["--batch-size", str(arguments.batch_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    yardstick = statistics.median(run["seconds"] for run in runs["forward + backward"])
    rows = []
    for name, results in runs.items():
        seconds = statistics.median(run["seconds"] for run in results)
        growth = statistics.median(run["growth"] for run in results)
        error = max(run["error"] for run in results)
        rows.append([name, f"{seconds:.2f}", f"{seconds / yardstick:.2f}", f"{growth:.0f}", f"{error:.0e}"])
    title = f"{arguments.model}, {arguments.batch_size} images, fp32, one thread, median of {arguments.repeats}"
    print(format_table(title, ["method", "CPU s", "ratio", "MiB", "error"], rows))


if __name__ == "__main__":
    main()
