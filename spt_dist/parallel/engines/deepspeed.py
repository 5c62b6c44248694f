"""DeepSpeed's ZeRO: 0 to 2 keep the weights whole on each rank, 3 spreads them too."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.compat import start_deepspeed
from spt_dist.models.sharded import whole_shape
from spt_dist.parallel.engines.base import Engine, State, keep_on_rank_0, read_buffers, write_buffers
from spt_dist.parallel.engines.deepspeed_config import deepspeed_config
from spt_dist.parallel.engines.optimizers import OptimizerSettings, build_optimizer
from spt_dist.sections import EngineConfig
from spt_dist.tuning.inject import trainable_parameters


class DeepSpeedEngine(Engine):
    """A DeepSpeed engine around our own model and optimizer."""

    def __init__(
        self, model: nn.Module, settings: OptimizerSettings, device: torch.device, config: EngineConfig
    ) -> None:
        import deepspeed

        start_deepspeed()
        num_trained = sum(prod(whole_shape(parameter)) for _, parameter in trainable_parameters(model))
        self.zero_stage, self.accumulation = config.zero_stage, settings.accumulation
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, settings),
            config=deepspeed_config(config, num_trained, settings.clip_norm, settings.accumulation),
        )
        self.module = self.engine.module
        self.moments = settings.moments

    @property
    def skips_overflow(self) -> bool:
        """Never: there is no float16."""
        return False

    def __call__(self, inputs: Tensor) -> Any:
        """Forward pass through DeepSpeed's engine, which autocasts if told so."""
        return self.engine(inputs)

    def passing(self, is_last: bool) -> AbstractContextManager[None]:
        """Tell DeepSpeed which pass is the last: it may come early, where a batch has few samples."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward pass; DeepSpeed reduces the gradients to their owners."""
        # DeepSpeed takes the mean over the passes of a step, and this is a part of a sum.
        self.engine.backward(loss * self.accumulation)

    def step(self) -> float:
        """Let DeepSpeed clip, step and broadcast the updated parameters."""
        norm: Any = None
        if not self.zero_stage:
            # Without ZeRO, DeepSpeed computes no norm unless it clips.
            gradients = [parameter.grad for _, parameter in trainable_parameters(self.module)]
            norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """The fp32 masters, gathered from the ranks that own them."""
        for name, parameter in trainable_parameters(self.module):
            yield name, self._whole(parameter, None)

    def gather_state(self) -> State:
        """The fp32 masters and their moments, gathered from the ranks that own them."""
        self._link_moments()
        states = list(self.engine.basic_optimizer.state.values())
        steps = (("optimizer/step", state["step"]) for state in states[:1] if "step" in state)
        moments = (
            (f"{moment}/{name}", self._whole(parameter, moment))
            for name, parameter in trainable_parameters(self.module)
            for moment in self.moments
            if any(moment in state for state in states)
        )
        parameters = ((f"param/{name}", value) for name, value in self.trained())
        return keep_on_rank_0(chain(parameters, read_buffers(self.module), moments, steps))

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Write masters, moments and the parameters that the next forward pass will use."""
        steps = state.get("optimizer/step")
        base = self.engine.basic_optimizer
        has_moments = any(f"{moment}/" in name for name in state for moment in self.moments)
        if self.zero_stage and has_moments:
            # Moments exist only after a step, and the setters below need them to.
            for partition in self._partitions():
                base.state[partition] = {moment: torch.zeros_like(partition) for moment in self.moments}
            self._link_moments()
        for name, parameter in trainable_parameters(self.module):
            moments = {moment: state[f"{moment}/{name}"] for moment in self.moments} if has_moments else {}
            self._write(parameter, state[f"param/{name}"], moments)
        write_buffers(self.module, state)
        if steps is not None:
            for moments in base.state.values():
                moments["step"] = steps.clone()
            self.engine.global_steps = int(steps)

    def _whole(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """The fp32 parameter, or one of its moments, gathered from its owners."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self.zero_stage:
            value: Tensor = parameter if moment is None else self.engine.basic_optimizer.state[parameter][moment]
            return value
        value = (
            safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)
        )
        return value.detach().reshape(whole_shape(parameter))

    def _write(self, parameter: nn.Parameter, value: Tensor, moments: State) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        moments = {moment: tensor.to(parameter.device) for moment, tensor in moments.items()}
        if self.zero_stage == 3:
            import deepspeed

            # The setters of whole values fail in 0.19.8 where the ranks' parts are not of one size.
            safe_set_local_fp32_param(parameter, _own_part(value.to(parameter.device)))
            for moment, tensor in moments.items():
                safe_set_local_optimizer_state(parameter, _own_part(tensor), moment)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)
            return
        parameter.copy_(value)
        if not self.zero_stage:
            if moments:
                self.engine.basic_optimizer.state[parameter] = moments
            return
        safe_set_full_fp32_param(parameter, value.to(parameter.device))
        for moment, tensor in moments.items():
            safe_set_full_optimizer_state(parameter, tensor, moment)

    def _partitions(self) -> list[Tensor]:
        """What DeepSpeed's optimizer steps on this rank: fp32 parts of groups of parameters."""
        name = "fp32_partitioned_groups_flat" if self.zero_stage == 3 else "single_partition_of_fp32_groups"
        partitions: list[Tensor] = getattr(self.optimizer, name)
        return partitions

    def _link_moments(self) -> None:
        """Let DeepSpeed's accessors find the moments of every parameter group.

        0.19.8 links them after the step of the first group only and then considers it done.
        """
        if self.zero_stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _own_part(value: Tensor) -> Tensor:
    """This rank's part of a flat value, with zeros behind the last rank's."""
    flat, ranks = value.flatten(), dist.get_world_size()
    size = -(-len(flat) // ranks)
    return F.pad(flat, (0, size * ranks - len(flat)))[dist.get_rank() * size :][:size]
