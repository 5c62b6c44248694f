"""What BIAS and PARTIAL-k train: exactly that moves, in place, and files and merged models hold it to the bit."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import Plan, inject, load_delta, merge, save_delta, trainable_parameters, unmerge
from spt_dist.models.classifier import build_classifier
from spt_dist.sections import EngineConfig, ModelConfig, RunConfig, TrainConfig
from spt_dist.training.pipeline import run_training
from spt_dist.tuning.methods import make_plan
from spt_dist.tuning.multitask.bank import TaskBank
from tests.ranks import run_ranks
from tests.tuning.plans_for_tests import make_images, make_model


@dataclass(frozen=True)
class Case:
    """A method on a small model, and how the names of all that it trains begin or end."""

    kind: str
    method: str
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def trains(self, name: str) -> bool:
        """Whether a tensor of the state dict is to move."""
        return name.startswith((*self.starts, self.head)) or name.endswith(self.ends)

    @property
    def head(self) -> str:
        """How the head's names begin."""
        return "head." if "vit" in self.kind or "registers" in self.kind else "head.fc."


CASES = {
    "bias, ViT": Case("vit", "bias", ends=(".bias",)),
    "bias, ViT with more tokens and scales": Case("registers, layer scale", "bias", ends=(".bias",)),
    "bias, Swin": Case("windows", "bias", ends=(".bias", ".attn.relative_position_bias_table")),
    "bias, ConvNeXt": Case("convolutions", "bias", ends=(".bias",)),
    "partial, ViT": Case("vit", "partial", ("blocks.1.", "norm.")),
    "partial, Swin": Case("windows", "partial", ("layers.", "norm."), options={"num_blocks": 3}),
    "partial, ConvNeXt": Case(
        "convolutions", "partial", ("stages.2.blocks.", "stages.3.", "head.norm."), options={"num_blocks": 2}
    ),
}


def tune(case: Case) -> nn.Module:
    """A model with the case's plan."""
    model = make_model(case.kind)
    return inject(model, make_plan(case.method, model, **case.options))


def train(tuned: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Three steps of AdamW."""
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable_parameters(tuned)], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(tuned.train()(images), labels).backward()
        optimizer.step()
    tuned.eval()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors."""
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exactly_what_is_planned_moves_and_files_and_merging_keep_it(case: Case, tmp_path: Path) -> None:
    path, (images, labels) = tmp_path / "task.safetensors", make_images(case.kind)
    before = values_of(make_model(case.kind))
    tuned = tune(case)
    assert torch.equal(tuned(images), make_model(case.kind)(images)), "step 0 is the backbone"
    train(tuned, images, labels)
    after, outputs = values_of(tuned), tuned(images)
    assert list(after) == list(before), "in place, so that names stay"
    parameters = {name for name, _ in tuned.named_parameters()}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in parameters if case.trains(name)}
    assert moved == {name for name, _ in trainable_parameters(tuned)}
    save_delta(tuned, path)
    loaded = load_delta(make_model(case.kind), path)
    merged = merge(loaded)
    assert not hasattr(merged, "spt_plan")
    for model in (loaded, merged):
        assert torch.equal(model(images), outputs)
        assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    backbone = unmerge(merged, path).state_dict()
    for name, value in backbone.items():
        assert torch.equal(value, (after if name.startswith(case.head) else before)[name]), name


def test_many_tasks_share_a_backbone(tmp_path: Path) -> None:
    images, labels = make_images("windows")
    cases, wanted = [case for case in CASES.values() if case.kind == "windows"], []
    bank = TaskBank(make_model("windows").requires_grad_(False))
    for case in cases:
        tuned = tune(case)
        train(tuned, images, labels)
        save_delta(tuned, tmp_path / f"{case.method}.safetensors")
        bank.add(case.method, tmp_path / f"{case.method}.safetensors")
        wanted.append(tuned(images))
    mixed = bank(images, ["bias", "partial", "partial", "bias"])
    for sample, (output, task) in enumerate(zip(mixed, [0, 1, 1, 0], strict=True)):
        assert torch.allclose(output, wanted[task][sample], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-2)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bias_vit": ("vit_base_patch16_224", VIT, {"type": "bias"}),
    "bias_swin": ("swin_base_patch4_window7_224", SWIN, {"type": "bias"}),
    "partial_swin": ("swin_base_patch4_window7_224", SWIN, {"type": "partial", "num_blocks": 3}),
}
ENGINES = {
    "ddp": EngineConfig(type="ddp"),
    "fsdp": EngineConfig(type="fsdp"),
    "zero2": EngineConfig(type="deepspeed", zero_stage=2),
    "zero3": EngineConfig(type="deepspeed", zero_stage=3),
}


def train_all(engine: EngineConfig, folder: str) -> None:
    """One rank's part of all runs."""
    for run, (name, kwargs, method) in RUNS.items():
        config = RunConfig(
            model=ModelConfig(name=name, num_classes=10, kwargs=kwargs),
            data={"type": "digits", "image_size": 32, "num_train": 48},
            method=method,
            engine=engine,
            train=TrainConfig(epochs=2, batch_size=16, lr=1e-2, warmup_epochs=0, eval_interval=2),
            work_dir=f"{folder}/{run}",
        )
        run_training(config, "config.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dirs of the runs on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(train_all, 1, ENGINES["ddp"], str(folder))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_train_the_same_on_two_ranks(engine: str, alone: Path, tmp_path: Path) -> None:
    run_ranks(train_all, 2, ENGINES[engine], str(tmp_path))
    for run, (name, kwargs, method) in RUNS.items():
        tuned, other = (
            load_delta(build_classifier(name, 10, kwargs), folder / run / "task.safetensors")
            for folder in (tmp_path, alone)
        )
        plan = tuned.spt_plan
        assert isinstance(plan, Plan)
        assert plan.method == method["type"]
        before = build_classifier(name, 10, kwargs).state_dict()
        wanted = other.state_dict()
        for key, value in tuned.state_dict().items():
            is_moved = not torch.equal(value, before[key])
            assert is_moved == (key in plan.parameters or key in plan.head), f"{run}: {key}"
            # Attention does not depend on the keys' bias: its gradient is rounding, which Adam makes steps of.
            if not key.endswith("qkv.bias"):
                assert torch.allclose(value, wanted[key], rtol=1e-3, atol=1e-3), f"{run}: {key}"
