"""Whole replicas: gradients all-reduced by ``DistributedDataParallel``, or nothing at all on one rank."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spt_dist.parallel.engines.base import MOMENTS, Engine, OptimizerSettings, build_adamw
from spt_dist.tuning.inject import trainable_parameters


class DDPEngine(Engine):
    """Every rank holds the model and the optimizer."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings, device: torch.device, amp: bool = False) -> None:
        self.module = model.to(device)
        self.device, self.amp, self.clip_norm = device, amp, settings.clip_norm
        self.optimizer = build_adamw(model, settings)
        self.replica: nn.Module = model
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Buffers are indices that every rank derives from the same plan.
            self.replica = DistributedDataParallel(model, forward_sync_buffers=False)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Forward pass of this rank's replica."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            outputs: Tensor = self.replica(inputs)
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Backward pass; the replicas average their gradients meanwhile."""
        loss.backward()

    def step(self) -> float:
        """Clip, step and drop the gradients, the same on every rank."""
        parameters = [parameter for _, parameter in trainable_parameters(self.module)]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def gather_state(self) -> dict[str, Tensor]:
        """Copies of what every rank holds in full."""
        state = {}
        for name, parameter in trainable_parameters(self.module):
            state[f"param/{name}"] = parameter.detach().float().cpu()
            for moment in MOMENTS:
                if parameter in self.optimizer.state:
                    state[f"{moment}/{name}"] = self.optimizer.state[parameter][moment].float().cpu()
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], num_steps: int) -> None:
        """Take over parameters and moments; every rank loads the same."""
        for name, parameter in trainable_parameters(self.module):
            parameter.copy_(state[f"param/{name}"])
            if num_steps:
                moments = {moment: state[f"{moment}/{name}"].to(parameter) for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(num_steps)), **moments}
