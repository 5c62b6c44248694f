"""A trainer on this rank for a backbone with random weights, as a run builds it."""

import torch
from torch.utils.data import TensorDataset

from spt_dist import Plan
from spt_dist.data.task import Task
from spt_dist.parallel.backbone import build_backbone, training_form
from spt_dist.parallel.engines import OptimizerSettings, build_engine
from spt_dist.sections import EngineConfig, ModelConfig, RunConfig, TrainConfig
from spt_dist.training.trainer import Trainer
from spt_dist.tuning.inject import install, make_modules

ENGINES = {
    "ddp": EngineConfig(type="ddp"),
    "fsdp": EngineConfig(type="fsdp"),
    **{f"zero{stage}": EngineConfig(type="deepspeed", zero_stage=stage) for stage in range(4)},
}


def make_trainer(model_name: str, engine_name: str, plan: Plan, samples: TensorDataset, num_classes: int) -> Trainer:
    """Build the backbone in the engine's form, inject the plan and put it under the engine. Collective.

    Args:
        model_name: timm's.
        engine_name: one of ``ENGINES``.
        plan: of what is trained.
        samples: of one step of all ranks.
        num_classes: of the head.
    """
    cpu, engine, size = torch.device("cpu"), ENGINES[engine_name], len(samples)
    model_config = ModelConfig(name=model_name, num_classes=num_classes)
    backbone = build_backbone(model_config, engine, training_form(engine), 0, cpu, plan)
    tuned = install(backbone.model, plan, make_modules(backbone.model, plan), backbone.fingerprint)
    config = RunConfig(
        model=model_config,
        data={"type": "random"},
        method={"type": "random"},
        train=TrainConfig(epochs=1, batch_size=size),
        engine=engine,
    )
    task = Task(samples, samples, size, size, num_classes)
    settings = OptimizerSettings(config.train.lr, config.train.weight_decay)
    trainer = Trainer(build_engine(engine, tuned, settings, cpu), task, config, cpu)
    trainer.engine.module.train()
    return trainer
