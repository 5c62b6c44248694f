"""Whole replicas: gradients all-reduced by ``DistributedDataParallel``, or nothing at all on one rank."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spt_dist.parallel.engines.optimizers import OptimizerSettings
from spt_dist.parallel.engines.torch_engine import TorchEngine
from spt_dist.sections import EngineConfig


class DDPEngine(TorchEngine):
    """Every rank holds the model and the optimizer."""

    def __init__(
        self, model: nn.Module, settings: OptimizerSettings, device: torch.device, config: EngineConfig
    ) -> None:
        super().__init__(model, settings, device, config)
        if dist.get_world_size() > 1:
            # Buffers are indices that every rank derives from the same plan, and running means over all ranks.
            self.replica = DistributedDataParallel(model, forward_sync_buffers=False)

    def passing(self, is_last: bool) -> AbstractContextManager[None]:
        """Keep DDP from exchanging gradients before the last pass of a step."""
        if isinstance(self.replica, DistributedDataParallel) and not is_last:
            return self.replica.no_sync()
        return nullcontext()
