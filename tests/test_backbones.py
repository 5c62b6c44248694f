"""Every family of backbones through all stages on two ranks: from a published file to a merged model."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_dist
from spt_dist.allocation.plan import Plan
from spt_dist.models.classifier import build_classifier
from spt_dist.sections import EngineConfig, ModelConfig, RunConfig, SensitivityConfig, TrainConfig
from spt_dist.training.pipeline import run_training
from spt_dist.tuning.delta import load_delta
from tests.ranks import run_ranks

# The first test waits for all runs.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

SIZE = 32
VIT: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"img_size": SIZE, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
# Drop-path draws differently on each rank.
SWIN["drop_path_rate"] = 0.0
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40), "ls_init_value": 1.0}
ENGINES = {
    "ddp": EngineConfig(type="ddp"),
    "fsdp": EngineConfig(type="fsdp"),
    "zero2": EngineConfig(type="deepspeed", zero_stage=2),
    "zero3": EngineConfig(type="deepspeed", zero_stage=3),
}


@dataclass(frozen=True)
class Family:
    """A thin model of its kind."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    structured: str = "lora"


FAMILIES = {
    "ViT": Family("vit_base_patch16_224", VIT),
    "MAE's ViT, mean of tokens": Family("vit_base_patch16_224.mae", VIT | {"global_pool": "avg"}),
    "DINOv2 with registers, SwiGLU and LayerScale": Family(
        "vit_giant_patch14_reg4_dinov2", VIT | {"qk_norm": True, "init_values": 0.1}
    ),
    "CLIP's tower": Family("vit_base_patch16_clip_224", VIT),
    "split q, k, v": Family(
        "eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "qkv_fused": False}
    ),
    "DINOv3 with rotations, gates and biases": Family("vit_small_plus_patch16_dinov3_qkvb", VIT),
    "Swin": Family("swin_base_patch4_window7_224", SWIN),
    "Swin with adapters": Family("swin_base_patch4_window7_224", SWIN, "adapter"),
    "ConvNeXt": Family("convnext_base", CONVNEXT),
    "ConvNeXt of convolutions alone, with adapters": Family("convnext_base", CONVNEXT | {"conv_mlp": True}, "adapter"),
}


def make_config(family: Family, engine: EngineConfig, checkpoint: Path, work_dir: Path) -> RunConfig:
    model = ModelConfig(name=family.name, num_classes=10, kwargs=family.kwargs, checkpoint=str(checkpoint))
    return RunConfig(
        model=model,
        data={"type": "digits", "image_size": family.kwargs.get("img_size", SIZE), "num_train": 48},
        sensitivity=SensitivityConfig(num_samples=16, batch_size=8),
        method={"type": "spt", "structured": family.structured, "rank": 1, "budget": 0.2, "alpha": 30.0, "beta": 5.0},
        engine=engine,
        train=TrainConfig(epochs=2, batch_size=16, lr=1e-2, warmup_epochs=0, eval_interval=2),
        work_dir=str(work_dir),
    )


def write_source(family: Family, path: Path) -> Path:
    """Random weights of the family, with the head of another task."""
    torch.manual_seed(0)
    model = timm.create_model(family.name, num_classes=7, **family.kwargs)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save({"model": model.state_dict()}, path)
    return path


def train(configs: list[RunConfig]) -> None:
    """One rank's part of several runs, one after another."""
    for config in configs:
        run_training(config, "config.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each family a file of weights, and work dirs of one rank and of two under each engine."""
    folder = tmp_path_factory.mktemp("backbones")
    alone = []
    for kind, family in FAMILIES.items():
        (folder / kind).mkdir()
        checkpoint = write_source(family, folder / kind / "source.pth")
        alone.append(make_config(family, ENGINES["ddp"], checkpoint, folder / kind / "alone"))
    run_ranks(train, 1, alone, timeout=300)
    for name, engine in ENGINES.items():
        # All in one process group: most of a small run is starting the processes.
        together = [replace(each, engine=engine, work_dir=f"{Path(each.work_dir).parent}/{name}") for each in alone]
        run_ranks(train, 2, together, timeout=300)
    return folder


def read_losses(work_dir: Path) -> list[float]:
    lines = map(json.loads, (work_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def build(family: Family, checkpoint: Path) -> nn.Module:
    return build_classifier(family.name, 10, family.kwargs, str(checkpoint)).eval()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_all_stages(folder: Path, kind: str, engine: str) -> None:
    alone, found = folder / kind / "alone", folder / kind / engine
    plans = [Plan.load(path / "plan.safetensors") for path in (alone, found)]
    assert plans[0].matrices and plans[0].sparse
    assert plans[1].matrices == plans[0].matrices and plans[1].vectors == plans[0].vectors
    assert plans[1].num_trainable == plans[0].num_trainable <= 0.2 * plans[0].backbone_size
    assert read_losses(found) == pytest.approx(read_losses(alone), rel=2e-3)
    check_task(FAMILIES[kind], folder / kind / "source.pth", found / "task.safetensors")


def check_task(family: Family, checkpoint: Path, task: Path) -> None:
    """The task file belongs to the backbone of the file, changes its outputs, and merges into plain modules."""
    images = torch.randn(2, 3, *2 * [family.kwargs.get("img_size", SIZE)])
    backbone = build(family, checkpoint)
    keys = backbone.state_dict().keys()
    before = run(backbone, images)
    tuned = load_delta(backbone, task).eval()
    after = run(tuned, images)
    assert not torch.allclose(before, after, atol=1e-3)
    merged = spt_dist.merge(tuned)
    assert torch.allclose(run(merged, images), after, rtol=1e-4, atol=1e-4)
    if family.structured == "lora":
        assert merged.state_dict().keys() == keys


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> Tensor:
    outputs: Tensor = model(images)
    return outputs


def test_vit_large_in_full_size() -> None:
    """ViT-L/16 on 224 pixels, an image a sample: scores, a plan within its budget, a step, and the merged model."""
    torch.manual_seed(0)
    model = build_classifier("vit_large_patch16_224", 10)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    batch = torch.randn(2, 3, 224, 224), torch.tensor([3, 8])
    plan = spt_dist.allocate(spt_dist.estimate_sensitivity(model, [batch], F.cross_entropy), budget=0.0045, alpha=10.0)
    # The published number of ViT-L/16's weights without a head.
    assert plan.backbone_size == 303_301_632
    assert 0.9 * 0.0045 < plan.num_trainable / plan.backbone_size <= 0.0045 and plan.matrices
    tuned = spt_dist.inject(model, plan)
    before = run(tuned, batch[0])
    optimizer = torch.optim.AdamW([parameter for _, parameter in spt_dist.trainable_parameters(tuned)], lr=1e-3)
    F.cross_entropy(tuned(batch[0]), batch[1]).backward()
    optimizer.step()
    after = run(tuned.eval(), batch[0])
    assert not torch.allclose(after, before, rtol=1e-3)
    assert torch.allclose(run(spt_dist.merge(tuned), batch[0]), after, rtol=1e-4, atol=1e-4)
