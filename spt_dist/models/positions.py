"""Position embeddings of a ViT on a grid of patches of another size.

Shape suffixes: P positions, the class token's first; D width; h, w patches of a column and of a row.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def resample_positions(pos_embed_1PD: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """Interpolate the patches' positions; the class token's is kept.

    Args:
        pos_embed_1PD: ``(1, 1 + old[0] * old[1], D)``, any floating dtype; interpolated in fp32.
        old, new: patches of a column and of a row.
        mode: "bilinear" or "bicubic": pixels' corners are not aligned, nothing is smoothed before shrinking.

    Returns:
        ``(1, 1 + new[0] * new[1], D)``, dtype of ``pos_embed_1PD``.
    """
    patches_1Dhw = pos_embed_1PD[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    resized_1Dhw = F.interpolate(patches_1Dhw.float(), size=new, mode=mode, align_corners=False)
    patches_1PD = resized_1Dhw.flatten(2).transpose(1, 2).to(pos_embed_1PD.dtype)
    return torch.cat([pos_embed_1PD[:, :1], patches_1PD], dim=1)


def square_grid(shape: Sequence[int]) -> tuple[int, int] | None:
    """The grid of position embeddings ``(1, 1 + n * n, D)``: ``(n, n)``; ``None`` for any other shape."""
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2:
        return None
    side = math.isqrt(shape[1] - 1)
    return (side, side) if 1 + side * side == shape[1] else None
