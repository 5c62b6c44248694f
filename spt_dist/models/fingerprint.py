"""A short name for the exact weights of a backbone."""

import hashlib

import torch
from torch import nn

from spt_dist.models.matrices import find_heads, in_modules


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of everything in the state dict but the head.

    Args:
        model: the backbone, with or without a head, on any device.

    Returns:
        64 hexadecimal digits. Equal for a model and its copy loaded from a file.
    """
    heads = find_heads(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if in_modules(name, heads):
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
