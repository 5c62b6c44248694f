"""The small run that these tests train, and what they read from its work dir."""

import json
from pathlib import Path
from typing import Any

# Must come before timm: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # noqa: F401  # isort: skip

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spt_dist.allocation.plan import Plan
from tests.launch.processes import ROOT

MODEL_NAME = "vit_tiny_patch16_224"
MODEL_KWARGS: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NUM_TRAIN = 201
# 201 samples are six batches of 32 and one of 9: uneven shares on two and on three ranks.
STEPS_PER_EPOCH = 7
BUDGET = 1000

_CONFIG = """\
_base_ = [
    "{configs}/datasets/digits.py",
    "{configs}/schedules/adamw_cosine.py",
    "{configs}/engines/ddp.py",
    "{configs}/methods/spt_lora.py",
]
model = dict(name={name!r}, num_classes=10, kwargs=dict({kwargs!r}, **{more_kwargs!r}), checkpoint={checkpoint!r})
data = dict(image_size=16, num_train={num_train})
sensitivity = dict(num_samples=50, batch_size=16)
# With these alpha and beta the plan has low-rank modules, whole vectors and single weights.
method = dict(rank=2, budget={budget}, alpha=4.0, beta=4.0)
train = dict(epochs={epochs}, batch_size=32, lr=3e-2, warmup_epochs=1, eval_interval=2, checkpoint_interval=1)
"""


def write_config(path: Path, epochs: int = 8, checkpoint: Path | None = None, **more_kwargs: Any) -> Path:
    """Write a config whose run takes a second or two.

    Args:
        path: the file.
        epochs: of ``STEPS_PER_EPOCH`` steps.
        checkpoint: weights of the backbone; ``None`` for random ones.
        more_kwargs: further arguments of the model.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _CONFIG.format(
        configs=ROOT / "configs" / "_base_",
        name=MODEL_NAME,
        kwargs=MODEL_KWARGS,
        more_kwargs=more_kwargs,
        checkpoint=None if checkpoint is None else str(checkpoint),
        num_train=NUM_TRAIN,
        budget=BUDGET,
        epochs=epochs,
    )
    path.write_text(text, encoding="utf-8")
    return path


def write_backbone(path: Path, seed: int) -> Path:
    """Write random weights for the config's model, as a pre-trained checkpoint would come."""
    torch.manual_seed(seed)
    save_file(timm.create_model(MODEL_NAME, num_classes=0, **MODEL_KWARGS).state_dict(), path)
    return path


def read_lines(work_dir: Path) -> list[dict[str, Any]]:
    """The complete lines of ``metrics.jsonl``, none if there is no such file yet."""
    path = work_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_losses(work_dir: Path) -> dict[int, float]:
    """Step -> loss; a step that is recorded twice fails."""
    steps = [(line["step"], line["loss"]) for line in read_lines(work_dir) if "loss" in line]
    losses = dict(steps)
    assert len(losses) == len(steps), "a step is recorded twice"
    return losses


def read_summary(work_dir: Path) -> dict[str, Any]:
    """``summary.json``."""
    summary: dict[str, Any] = json.loads((work_dir / "summary.json").read_text(encoding="utf-8"))
    return summary


def read_task(work_dir: Path) -> dict[str, Tensor]:
    """The tensors of the task file: trained values and sparse indices."""
    return load_file(work_dir / "task.safetensors")


def read_plan(work_dir: Path) -> Plan:
    """The plan of the run."""
    return Plan.load(work_dir / "plan.safetensors")


def checkpoint_path(work_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint after ``step`` steps."""
    return work_dir / "checkpoints" / f"step-{step:08d}.safetensors"


def latest_step(work_dir: Path) -> int:
    """Steps that the latest checkpoint comes after; 0 if there is none."""
    pointer = work_dir / "checkpoints" / "latest"
    return int(pointer.read_text(encoding="utf-8").removeprefix("step-").split(".")[0]) if pointer.is_file() else 0


def assert_same_curve(work_dir: Path, reference: Path) -> None:
    """Losses, norms of the gradient, learning rates and accuracies are those of a run on another number of ranks."""
    expected, found = read_lines(reference), read_lines(work_dir)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    # The sums over ranks are rounded in another order; Adam carries the difference on. Seen: 2e-7 and 3e-6.
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        wanted = [line[key] for line in expected if key in line]
        assert [line[key] for line in found if key in line] == pytest.approx(wanted, rel=tolerance), key
    assert [line["lr"] for line in found if "lr" in line] == [line["lr"] for line in expected if "lr" in line]
    top1 = [line["top1"] for line in expected if "top1" in line]
    # An image that lies on the border between two classes may fall to either: two of 1,596.
    assert [line["top1"] for line in found if "top1" in line] == pytest.approx(top1, abs=2 / 1596)


def assert_same_plan(work_dir: Path, reference: Path) -> None:
    """The plans agree in everything."""
    expected, found = read_plan(reference), read_plan(work_dir)
    assert found.matrices == expected.matrices
    assert found.vectors == expected.vectors
    assert found.parameters == expected.parameters
    assert found.head == expected.head
    assert found.sparse.keys() == expected.sparse.keys()
    for name, indices in expected.sparse.items():
        assert torch.equal(found.sparse[name], indices), name


def assert_same_task(work_dir: Path, reference: Path) -> None:
    """The task files agree but for rounding."""
    expected, found = read_task(reference), read_task(work_dir)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # Values move by the learning rate, 3e-2, a step; the difference seen is 5e-7.
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)
