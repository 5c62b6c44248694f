"""Training a segmentation model under every engine: SGD, batch norm over ranks, a rate of its own for the head."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spt_dist.data.ade20k import build_ade20k
from spt_dist.data.batches import GlobalBatches
from spt_dist.data.loader import load_batches
from spt_dist.data.scenes import make_scenes
from spt_dist.data.task import Task
from spt_dist.models.matrices import find_heads, head_buffers, in_modules
from spt_dist.models.sharded import whole_value
from spt_dist.parallel.backbone import build_backbone, training_form
from spt_dist.parallel.checkpoints import find_checkpoint
from spt_dist.parallel.engines import OptimizerSettings, build_engine
from spt_dist.sections import EngineConfig, LogConfig, ModelConfig, RunConfig, TrainConfig
from spt_dist.training.trainer import Trainer
from spt_dist.tuning.inject import inject, install, make_modules, trainable_parameters
from spt_dist.tuning.methods import make_plan
from tests.ranks import run_ranks
from tests.segmentors_for_tests import SETTINGS, make_segmentor

CPU = torch.device("cpu")
ENGINES = [
    EngineConfig(type="ddp"),
    EngineConfig(type="fsdp"),
    *(EngineConfig(type="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)),
]
STEPS, BATCH = 7, 4
TRAIN = TrainConfig(
    iterations=STEPS,
    batch_size=BATCH,
    optimizer="sgd",
    lr=0.05,
    head_lr_mult=4.0,
    schedule="poly",
    min_lr=1e-3,
    weight_decay=0.01,
    eval_interval=STEPS,
    checkpoint_interval=4,
)
MODEL = ModelConfig(name="mmseg.EncoderDecoder", num_classes=150, kwargs=SETTINGS)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 training and 3 held-out scenes: two full batches an epoch, and one over."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "root", 9, 3, size=40, show_progress=False)


def make_task(root: str) -> Task:
    """Crops as large as the model's windows."""
    return build_ade20k(root, crop_size=(32, 32), scale=(80, 40), num_workers=0)


def make_trainer(engine: EngineConfig, root: str, folder: str, **train: Any) -> Trainer:
    """As ``run_training`` makes it, with the same random weights everywhere."""
    config = RunConfig(
        model=MODEL,
        data={"type": "ade20k"},
        method={"type": "lora"},
        train=replace(TRAIN, **train),
        engine=engine,
        log=LogConfig(backends=[]),
        seed=5,
        work_dir=folder,
    )
    backbone = build_backbone(MODEL, engine, training_form(engine), 5, CPU)
    plan = make_plan("lora", make_segmentor(150), rank=2)
    torch.manual_seed(5)
    model = install(backbone.model, plan, make_modules(backbone.model, plan), backbone.fingerprint)
    settings = OptimizerSettings(0.05, 0.01, None, optimizer="sgd", momentum=0.9, separate_head=True)
    return Trainer(build_engine(engine, model, settings, CPU), make_task(root), config, CPU)


def train(engine: EngineConfig, root: str, folder: str, stop_after: int | None = None) -> dict[str, Any]:
    """Train, or go on; losses are in the folder, and all that was trained comes back."""
    trainer = make_trainer(engine, root, folder)
    checkpoint = find_checkpoint("auto", Path(folder, "checkpoints"))
    if checkpoint is not None:
        trainer.resume(checkpoint)
    frozen = {n: whole_value(p).clone() for n, p in trainer.engine.module.named_parameters() if not p.requires_grad}
    if stop_after is not None:
        trainer.timetable = replace(trainer.timetable, total_steps=stop_after)
    scores = trainer.fit()
    for name, parameter in trainer.engine.module.named_parameters():
        assert parameter.requires_grad or torch.equal(whole_value(parameter), frozen[name]), name
    return {"scores": scores, "state": trainer.engine.gather_state()}


def plain_training(root: str) -> dict[str, Tensor]:
    """The same in one loop over torch's own parts: batch norm over the whole batch, SGD with two groups."""
    model = make_segmentor(150, seed=5)
    for module in model.modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            module.__class__ = torch.nn.BatchNorm2d
    torch.manual_seed(5)
    inject(model, make_plan("lora", make_segmentor(150), rank=2))
    heads = find_heads(model)
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in trainable_parameters(model):
        is_head = in_modules(name, heads)
        groups.setdefault((is_head, parameter.ndim == 2 or (is_head and parameter.ndim == 4)), []).append(parameter)
    optimizer = torch.optim.SGD(
        [
            {"params": parameters, "weight_decay": 0.01 if decayed else 0.0, "factor": 4.0 if is_head else 1.0}
            for (is_head, decayed), parameters in groups.items()
        ],
        lr=0.05,
        momentum=0.9,
    )
    task = make_task(root)
    batches = GlobalBatches(9, BATCH, seed=5, only_full=True)
    model.train()
    for step, batch in enumerate(load_batches(task.train, batches.steps(0, STEPS), CPU)):
        for group in optimizer.param_groups:
            group["lr"] = (0.05 * group["factor"] - 1e-3) * (1 - step / (STEPS - 1)) ** 0.9 + 1e-3
        loss: Any = 0
        for weight, logits in zip((1.0, 0.4), model(batch.inputs), strict=True):
            large = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
            # mmseg's mean is over all pixels, those without a label too.
            loss += weight * F.cross_entropy(large, batch.targets, ignore_index=255, reduction="none").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {f"param/{name}": parameter.detach() for name, parameter in trainable_parameters(model)}
    state |= {f"buffer/{name}": buffer for name, buffer in head_buffers(model).items()}
    names = {id(parameter): name for name, parameter in trainable_parameters(model)}
    for parameter, moments in optimizer.state.items():
        state[f"momentum_buffer/{names[id(parameter)]}"] = moments["momentum_buffer"]
    return copy.deepcopy(state)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine.type}{engine.zero_stage}")
def test_every_engine_trains_as_a_plain_loop(
    engine: EngineConfig, world_size: int, scenes: Path, tmp_path: Path
) -> None:
    results = run_ranks(train, world_size, engine, str(scenes), str(tmp_path))
    assert_same(results[0]["state"], plain_training(str(scenes)))
    assert all(result["scores"] == results[0]["scores"] for result in results)
    assert set(results[0]["scores"]) == {"mIoU", "mAcc", "aAcc"}


@pytest.mark.distributed
def test_a_run_goes_on_under_another_engine_and_number_of_ranks(scenes: Path, tmp_path: Path) -> None:
    """From a checkpoint in the middle of an epoch: momenta and running means go along."""
    run_ranks(train, 2, EngineConfig(type="deepspeed", zero_stage=2), str(scenes), str(tmp_path), 3)
    run_ranks(train, 1, EngineConfig(type="deepspeed", zero_stage=3), str(scenes), str(tmp_path), 5)
    (result,) = run_ranks(train, 1, EngineConfig(type="fsdp"), str(scenes), str(tmp_path))
    assert_same(result["state"], plain_training(str(scenes)))
