"""Looking through what engines and torch put around a model."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without (Distributed)DataParallel, DeepSpeed's engine or ``torch.compile`` around it."""
    while True:
        # The engine is told by its class's module: importing DeepSpeed takes seconds.
        is_engine = type(model).__module__.startswith("deepspeed.")
        if is_engine or isinstance(model, DistributedDataParallel | nn.DataParallel):
            inner: Any = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
