"""What a forward pass keeps for its backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor


def kept_storages(forward: Callable[[], Tensor]) -> dict[int, int]:
    """Address -> bytes of each storage that ``forward`` keeps, parameters and inputs included."""
    kept: dict[int, int] = {}
    # Held on to, so that no address is given out again meanwhile.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(forward())
    return kept
