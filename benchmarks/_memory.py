"""Resident memory of this process on Linux and its peak since a reset, and what a forward pass keeps."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_STATUS = Path("/proc/self/status")


def reset_peak() -> int:
    """Forget the peak so far; returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _field("VmRSS")


def peak_bytes() -> int:
    """The most resident bytes since the last reset."""
    return _field("VmHWM")


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that ``forward`` keeps for its backward pass, each storage once, the model's parameters not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Held on to until all is counted: what is freed meanwhile leaves its address to others.
        outputs = forward()
    total = sum(kept.values())
    del outputs
    return total


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
