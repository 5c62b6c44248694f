"""Engines: ways of training a tuned model on several ranks, behind one interface."""

import torch
from torch import nn

from spt_dist.config import lookup
from spt_dist.errors import UserError
from spt_dist.models.norms import synchronise
from spt_dist.parallel.engines.base import Engine
from spt_dist.parallel.engines.ddp import DDPEngine
from spt_dist.parallel.engines.deepspeed import DeepSpeedEngine
from spt_dist.parallel.engines.deepspeed_config import read_settings
from spt_dist.parallel.engines.fsdp import FSDPEngine
from spt_dist.parallel.engines.optimizers import OptimizerSettings
from spt_dist.parallel.units import find_units
from spt_dist.sections import EngineConfig

ENGINES = {"ddp": DDPEngine, "fsdp": FSDPEngine, "deepspeed": DeepSpeedEngine}
ZERO_STAGES = (0, 1, 2, 3)
# Key of an engine's config -> the only engine that knows it, and the value that means nothing.
_OWN_KEYS = {"deepspeed": ("deepspeed", None), "offload": ("deepspeed", False), "shard_size": ("fsdp", None)}


def check_engine(config: EngineConfig) -> None:
    """Refuse a config that no engine can serve.

    Raises:
        UserError: an unknown type or ZeRO stage, a key for another engine, or DeepSpeed settings that can't be used.
    """
    lookup("engine.type", config.type, ENGINES)
    for key, (owner, nothing) in _OWN_KEYS.items():
        if config.type != owner and getattr(config, key) != nothing:
            raise UserError(f"config: engine.{key} is for engine.type={owner!r}, this one is {config.type!r}")
    if config.zero_stage not in ZERO_STAGES:
        raise UserError(f"config: engine.zero_stage={config.zero_stage}: choose one of 0, 1, 2, 3")
    if config.compile is not None:
        lookup("engine.compile", config.compile, dict.fromkeys(torch.compiler.list_backends(exclude_tags=())))
    if config.type != "deepspeed":
        return
    if config.offload and not config.zero_stage:
        raise UserError("config: engine.offload needs engine.zero_stage of 1 or more")
    if config.amp and config.amp_dtype == "float16":
        # DeepSpeed 0.19.8 clips gradients while they are still scaled, which clips them all.
        raise UserError("config: engine.amp_dtype='float16' does not work with DeepSpeed; use bfloat16, or ddp or fsdp")
    if config.zero_stage == 3:
        if config.compile is not None:
            raise UserError("config: engine.compile does not work with ZeRO stage 3; use engine.type='fsdp' for both")
        if config.frozen_dtype is not None:
            raise UserError("config: engine.frozen_dtype does not work with ZeRO stage 3; use engine.type='fsdp'")
    read_settings(config)


def build_engine(config: EngineConfig, model: nn.Module, settings: OptimizerSettings, device: torch.device) -> Engine:
    """Put the tuned ``model`` under the engine that ``config`` names. Collective.

    Args:
        config: has passed ``check_engine``.
        model: in the form that the engine trains (``parallel.backbone``).
        settings: of the optimizer.
        device: the model's.

    Raises:
        UserError: activation checkpointing is asked of a model that has none.
    """
    synchronise(model, device)
    if config.activation_checkpointing:
        set_checkpointing = getattr(model, "set_grad_checkpointing", None)
        if not callable(set_checkpointing):
            raise UserError(
                f"config: engine.activation_checkpointing: {type(model).__name__} has no set_grad_checkpointing, as "
                "timm's models have; switch it off"
            )
        set_checkpointing(True)
    if config.compile is not None:
        for unit in find_units(model):
            unit.compile(backend=config.compile)
    return ENGINES[config.type](model, settings, device, config)


__all__ = ["Engine", "OptimizerSettings", "build_engine", "check_engine"]
