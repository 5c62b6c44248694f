"""Engines: ways of training a tuned model on several ranks, behind one interface."""

import torch
from torch import nn

from spt_dist.config import EngineConfig, lookup
from spt_dist.errors import UserError
from spt_dist.parallel.engines.base import Engine, OptimizerSettings
from spt_dist.parallel.engines.ddp import DDPEngine
from spt_dist.parallel.engines.deepspeed import DeepSpeedEngine

ENGINES = {"ddp": DDPEngine, "deepspeed": DeepSpeedEngine}
ZERO_STAGES = (0, 1, 2)


def check_engine(config: EngineConfig) -> None:
    """Refuse a config that no engine can serve.

    Raises:
        UserError: an unknown type, or a ZeRO stage that is not offered.
    """
    lookup("engine.type", config.type, ENGINES)
    if config.zero_stage not in ZERO_STAGES:
        raise UserError(f"config: engine.zero_stage={config.zero_stage}: choose one of 0, 1, 2")


def build_engine(config: EngineConfig, model: nn.Module, settings: OptimizerSettings, device: torch.device) -> Engine:
    """Put the tuned ``model`` on ``device`` and under the engine that ``config`` names. Collective."""
    check_engine(config)
    if config.type == "deepspeed":
        return DeepSpeedEngine(model, settings, device, config.zero_stage, config.amp)
    return DDPEngine(model, settings, device, config.amp)


__all__ = ["Engine", "OptimizerSettings", "build_engine", "check_engine"]
