"""What the engines made of torch alone have in common: optimizer, autocast, loss scaling, and their state."""

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.models.sharded import fill, whole_value
from spt_dist.parallel.engines.base import Engine, State, keep_on_rank_0, read_buffers, write_buffers
from spt_dist.parallel.engines.optimizers import OptimizerSettings, build_optimizer
from spt_dist.parallel.engines.scaler import read_scaler, write_scaler
from spt_dist.sections import EngineConfig
from spt_dist.tuning.inject import trainable_parameters


class TorchEngine(Engine):
    """A model whose parameters torch's own optimizer can step; what is around it is for subclasses."""

    def __init__(
        self, model: nn.Module, settings: OptimizerSettings, device: torch.device, config: EngineConfig
    ) -> None:
        self.module = self.replica = model
        self.device, self.clip_norm = device, settings.clip_norm
        self.autocast = config.amp
        self.dtype = getattr(torch, config.amp_dtype)
        self.optimizer = build_optimizer(model, settings)
        self.moments = settings.moments
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp and config.amp_dtype == "float16")

    @property
    def skips_overflow(self) -> bool:
        """Not once the loss is not scaled up any more: what is not finite then is not the scaling's fault."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def __call__(self, inputs: Tensor) -> Any:
        """Forward pass of this rank."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.autocast):
            return self.replica(inputs)

    def backward(self, loss: Tensor) -> None:
        """Backward pass, of a scaled loss with float16."""
        self.scaler.scale(loss).backward()

    def step(self) -> float:
        """Clip, step and drop the gradients, the same on every rank."""
        self.average_gradients()
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for _, parameter in trainable_parameters(self.module)]
        norm = float(whole_value(torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))))
        if self.scaler.is_enabled() or math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def average_gradients(self) -> None:
        """Average over the ranks what has not been averaged in the backward pass."""

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters, gathered where they are sharded."""
        for name, parameter in trainable_parameters(self.module):
            yield name, whole_value(parameter)

    def gather_state(self) -> State:
        """Parameters and moments, gathered one at a time where they are sharded."""
        states = self.optimizer.state
        moments = (
            (f"{moment}/{name}", whole_value(states[parameter][moment]))
            for name, parameter in trainable_parameters(self.module)
            if parameter in states
            for moment in self.moments
        )
        steps = (("optimizer/step", state["step"]) for state in list(states.values())[:1] if "step" in state)
        parameters = ((f"param/{name}", value) for name, value in self.trained())
        buffers = read_buffers(self.module)
        return keep_on_rank_0(chain(parameters, buffers, moments, steps, read_scaler(self.scaler)))

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over parameters and moments; each rank keeps its own rows of what is sharded."""
        steps = state.get("optimizer/step")
        for name, parameter in trainable_parameters(self.module):
            fill(parameter, state[f"param/{name}"])
            moments = {moment: torch.zeros_like(parameter) for moment in self.moments if f"{moment}/{name}" in state}
            for moment, value in moments.items():
                fill(value, state[f"{moment}/{name}"])
            if moments:
                self.optimizer.state[parameter] = moments if steps is None else {"step": steps.clone(), **moments}
        write_buffers(self.module, state)
        write_scaler(self.scaler, state)
