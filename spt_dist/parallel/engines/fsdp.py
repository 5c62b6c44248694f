"""FSDP2: the backbone spread over the ranks block by block, and gathered for the moment of its use.

What is trained beside a frozen backbone is a few MB: every rank keeps it whole, and one all-reduce a step averages its
gradients. Where the backbone itself is trained, FSDP2 shards gradients and moments as well.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from spt_dist.parallel.engines.optimizers import OptimizerSettings
from spt_dist.parallel.engines.torch_engine import TorchEngine
from spt_dist.sections import EngineConfig
from spt_dist.tuning.inject import trainable_parameters


class FSDPEngine(TorchEngine):
    """A model that ``parallel.backbone.shard`` has spread, injected before or since."""

    def __init__(
        self, model: nn.Module, settings: OptimizerSettings, device: torch.device, config: EngineConfig
    ) -> None:
        super().__init__(model, settings, device, config)
        self._whole = [p for _, p in trainable_parameters(model) if not isinstance(p, DTensor)]
        for parameter in self._whole:
            dist.broadcast(parameter.detach(), 0)

    def average_gradients(self) -> None:
        """Average over the ranks what FSDP2 does not know of."""
        gradients: list[Tensor] = [p.grad for p in self._whole if p.grad is not None]
        if not gradients or dist.get_world_size() == 1:
            return
        flat = parameters_to_vector(gradients)
        dist.all_reduce(flat)
        vector_to_parameters(flat / dist.get_world_size(), gradients)
