"""The engines against a plain training loop in one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from spt_dist import UserError, inject, trainable_parameters
from spt_dist.config import EngineConfig, TrainConfig
from spt_dist.data.batches import load_batches
from spt_dist.data.task import Task
from spt_dist.parallel.checkpoints import load_checkpoint
from spt_dist.parallel.engines import Engine, OptimizerSettings, build_engine
from spt_dist.training.metrics import read_metrics
from spt_dist.training.trainer import Trainer
from tests.models_for_tests import make_samples, make_vit
from tests.ranks import run_ranks
from tests.tuning.plans_for_tests import random_plan

CPU = torch.device("cpu")
KINDS = ("adapter", "lora", "prompt")
SETTINGS = OptimizerSettings(lr=1e-2, weight_decay=0.1, clip_norm=0.5)
# 22 samples in batches of 8: the last batch of an epoch divides neither by 4 ranks nor by 8.
TRAIN = TrainConfig(epochs=3, batch_size=8, lr=1e-2, weight_decay=0.1, clip_norm=0.5, checkpoint_interval=1)
ENGINES = [EngineConfig(type="ddp"), *(EngineConfig(type="deepspeed", zero_stage=stage) for stage in (0, 1, 2))]
CASES = [(engine, world_size) for world_size in (1, 2) for engine in ENGINES] + [(ENGINES[0], 4), (ENGINES[3], 4)]


def make_task() -> Task:
    """22 training and 9 held-out random images."""
    return Task(TensorDataset(*make_samples(22)), TensorDataset(*make_samples(9, seed=1)), 22, 9, 10)


def make_engine(config: EngineConfig, model_seed: int = 0) -> Engine:
    """An engine around a tuned model whose trained parameters do not depend on anything else drawn."""
    model = make_vit()
    torch.manual_seed(model_seed)
    return build_engine(config, inject(model, random_plan(model, 3, KINDS)), SETTINGS, CPU)


def train(config: EngineConfig, folder: str) -> dict[str, Any]:
    """Train three epochs; what came of it."""
    engine = make_engine(config)
    frozen = {n: p.clone() for n, p in engine.module.named_parameters() if not p.requires_grad}
    trainer = Trainer(engine, make_task(), TRAIN, 5, Path(folder), CPU)
    top1 = trainer.fit()
    for name, parameter in engine.module.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name]), name
    return {"top1": top1, "state": engine.gather_state()}


def read_losses(folder: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def plain_loop() -> tuple[list[float], dict[str, Tensor]]:
    """The same training written down without any of our training code: whole batches, mean loss, torch's AdamW."""
    model = make_vit()
    torch.manual_seed(0)
    model = inject(model, random_plan(model, 3, KINDS))
    images, labels = make_samples(22)
    named = dict(trainable_parameters(model))
    matrices = [parameter for parameter in named.values() if parameter.ndim == 2]
    others = [parameter for parameter in named.values() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * 3 - 1, eta_min=1e-5)
    losses = []
    for epoch in range(3):
        order = torch.randperm(22, generator=torch.Generator().manual_seed(5 * 1_000_003 + epoch))
        for batch in order.split(8):
            model.train()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
            optimizer.step()
            cosine.step()
            losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in named.items()}


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "world_size"), CASES, ids=lambda case: str(getattr(case, "type", case)))
def test_every_engine_follows_the_plain_loop(tmp_path: Path, engine: EngineConfig, world_size: int) -> None:
    losses, parameters = plain_loop()
    results = run_ranks(train, world_size, engine, str(tmp_path))
    assert read_losses(tmp_path) == pytest.approx(losses, rel=2e-5)
    for name, value in parameters.items():
        found = results[0]["state"][f"param/{name}"]
        assert torch.allclose(found, value, rtol=1e-3, atol=2e-4), name
    assert len({result["top1"] for result in results}) == 1
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000009.safetensors"
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


def resume(config: EngineConfig, checkpoint: str, folder: str) -> None:
    """Go on from a checkpoint with an engine whose trained parameters have been thrown away."""
    engine = make_engine(config, model_seed=99)
    trainer = Trainer(engine, make_task(), TRAIN, 5, Path(folder), CPU)
    trainer.resume(load_checkpoint(Path(checkpoint)))
    assert trainer.num_steps == 6
    trainer.fit()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("writer", "writers", "reader", "readers"),
    [
        (ENGINES[0], 1, ENGINES[0], 1),
        (ENGINES[0], 1, ENGINES[3], 2),
        (ENGINES[3], 2, ENGINES[0], 2),
        (ENGINES[3], 2, ENGINES[1], 1),
        (ENGINES[1], 2, ENGINES[2], 2),
    ],
    ids=lambda case: f"{case.type}{case.zero_stage}" if isinstance(case, EngineConfig) else str(case),
)
def test_checkpoints_move_between_engines_and_world_sizes(
    tmp_path: Path, writer: EngineConfig, writers: int, reader: EngineConfig, readers: int
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_ranks(train, writers, writer, str(first))
    second.mkdir()
    (second / "metrics.jsonl").write_bytes((first / "metrics.jsonl").read_bytes())
    run_ranks(resume, readers, reader, str(first / "checkpoints" / "step-00000006.safetensors"), str(second))
    same_setup = (writer, writers) == (reader, readers)
    assert read_losses(second) == (read_losses(first) if same_setup else pytest.approx(read_losses(first), rel=2e-5))


def three_losses(config: EngineConfig) -> list[float]:
    """The losses of three steps on the same batch."""
    engine = make_engine(config)
    images, labels = make_samples(8)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(engine(images).float(), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert all(parameter.dtype == torch.float32 for _, parameter in trainable_parameters(engine.module))
    return losses


@pytest.mark.distributed
@pytest.mark.parametrize("engine", [ENGINES[0], ENGINES[1], ENGINES[3]], ids=["ddp", "zero0", "zero2"])
def test_autocast_is_close_to_full_precision(engine: EngineConfig) -> None:
    rounded = run_ranks(three_losses, 2, replace(engine, amp=True))[0]
    full = run_ranks(three_losses, 1, ENGINES[0])[0]
    assert rounded == pytest.approx(full, rel=0.03)
    assert rounded != full


def train_on_nan(config: EngineConfig) -> str:
    """A run whose data hold a NaN; the error and whether the parameters are untouched."""
    images, labels = make_samples(22)
    images[4] = float("nan")
    engine = make_engine(config)
    trainer = Trainer(engine, replace(make_task(), train=TensorDataset(images, labels)), TRAIN, 5, Path("unused"), CPU)
    before = {name: parameter.clone() for name, parameter in trainable_parameters(engine.module)}
    try:
        for batch in _whole_epoch(trainer):
            before = {name: parameter.clone() for name, parameter in trainable_parameters(engine.module)}
            trainer.train_step(batch, 1e-2)
    except UserError as error:
        assert all(torch.equal(p, before[n]) for n, p in trainable_parameters(engine.module))
        return str(error)
    return "no error"


def _whole_epoch(trainer: Trainer) -> Any:
    return load_batches(trainer.task.train, trainer.batches.deal(0), CPU)


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_step() -> None:
    messages = run_ranks(train_on_nan, 2, ENGINES[0])
    assert messages[0] == messages[1]
    assert messages[0].startswith("the loss is nan at step ")
