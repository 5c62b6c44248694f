"""Task banks with tasks of random values, and what their outputs have to be."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from spt_dist import Plan, inject, load_delta, save_delta
from spt_dist.tuning.multitask.bank import TaskBank
from tests.tuning.plans_for_tests import disturb

Maker = Callable[[], nn.Module]
Planner = Callable[[nn.Module], Plan]


def write_task(make: Maker, plan: Planner, path: Path, classes: int = 10) -> Path:
    """A task file for ``make()`` with random values and a number of classes."""
    model = make()
    if classes != 10:
        model.reset_classifier(classes)
    tuned = inject(model, plan(model))
    disturb(tuned, seed=classes)
    save_delta(tuned, path)
    return path


def make_bank(make: Maker, plans: dict[str, tuple[Planner, int]], folder: Path) -> tuple[TaskBank, dict[str, Path]]:
    """A bank over ``make()``, and the files of its tasks: name -> plan and number of classes."""
    bank, files = TaskBank(make().requires_grad_(False)), {}
    for name, (plan, classes) in plans.items():
        files[name] = write_task(make, plan, folder / f"{name}.safetensors", classes)
        bank.add(name, files[name])
    return bank, files


@torch.no_grad()
def check(bank: TaskBank, make: Maker, files: dict[str, Path], images: Tensor, tasks: list[str]) -> None:
    """A mixed batch, and batches of each task, against the models of ``load_delta``."""
    models = {name: load_delta(make(), path).eval() for name, path in files.items()}
    outputs = bank(images, tasks)
    assert len(outputs) == len(tasks)
    for image, task, output in zip(images, tasks, outputs, strict=True):
        wanted = models[task](image[None])[0]
        assert output.shape == wanted.shape
        assert torch.allclose(output, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    for name, model in models.items():
        bank.switch(name)
        assert torch.equal(bank(images), model(images))


def seen_by(module: nn.Module, run: Callable[[], object]) -> list[int]:
    """The numbers of samples (or what else lies along the leading axis) that a module is given in ``run``."""
    seen: list[int] = []
    handle = module.register_forward_hook(lambda module, inputs, outputs: seen.append(len(inputs[0])))
    run()
    handle.remove()
    return seen
