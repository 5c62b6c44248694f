"""A short name for the exact weights of a backbone."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spt_dist.models.checkpoints import backbone_state
from spt_dist.models.sharded import whole_value


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of everything in the state dict but the head.

    Args:
        model: the backbone, with or without a head, on any device. Collective if it is spread over the ranks.

    Returns:
        64 hexadecimal digits. Equal for a model and its copy loaded from a file.
    """
    state = backbone_state(model)
    return hash_tensors((name, whole_value(state[name])) for name in sorted(state))


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """As ``fingerprint``, from names and values in the order of the names, one at a time."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
