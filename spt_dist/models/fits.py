"""Tensors of a checkpoint made to fit a model of another image, patch or window size, as timm does it.

Shape suffixes: P positions, tokens without a patch first; D width; O, I channels; K patches' pixels; H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.models.formats import Shape
from spt_dist.models.matrices import own_name_of, parent_of

Grid = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """What makes a tensor fit.

    Attributes:
        make: the tensor of the file -> the model's, on the CPU, in the same dtype (a segmentor's positions: fp32).
        how: the same in words.
    """

    make: Callable[[Tensor], Tensor]
    how: str


def find_fit(model: nn.Module, name: str, found: Shape, wanted: Shape, patch: Grid | None) -> Fit | None:
    """How a tensor of one shape becomes the one that a model needs.

    Position embeddings of another grid of patches, patch embeddings of another patch size, and Swin's and BEiT's tables
    of relative positions are resampled. What linear layers hold in 2 axes and convolutions of single pixels in 4 is
    reshaped.

    Args:
        model: the backbone. One with a method ``fit_pos_embed`` fits its positions itself.
        name: of the tensor in ``model``.
        found, wanted: shapes of the file's tensor and of the model's.
        patch: height and width of the patches that the file's patch embedding takes, if it has one.

    Returns:
        ``None``: the tensor is taken as it is; if ``found`` is not ``wanted``, it does not fit.
    """
    if name == "pos_embed":
        return _fit_positions(model, found, wanted, patch)
    if own_name_of(name) == "relative_position_bias_table":
        return _fit_table(model.get_submodule(parent_of(name)), found, wanted)
    if found == wanted:
        return None
    if name.endswith("patch_embed.proj.weight") and len(found) == len(wanted) == 4 and found[:2] == wanted[:2]:
        return Fit(_patch_resampler(wanted[2:]), _arrow(found[2:], wanted[2:]))
    # A kernel of one pixel; the pixels of a larger one might come in any order.
    if {found, wanted} == {found[:2], (*found[:2], 1, 1)}:
        return Fit(lambda weight: weight.reshape(wanted), "reshaped")
    return None


def _fit_positions(model: Any, found: Shape, wanted: Shape, patch: Grid | None) -> Fit | None:
    new = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if new is None or len(found) != 3 or len(wanted) != 3 or found[::2] != wanted[::2]:
        return None
    new = (int(new[0]), int(new[1]))
    # Those of class token and registers.
    others = wanted[1] - prod(new)
    if hasattr(model, "fit_pos_embed"):
        side = _square_side(found[1] - others)
        return None if found == wanted or not side else Fit(model.fit_pos_embed, _arrow((side, side), new))
    for own_others in (others, 0):
        old = _grid_of(found[1] - own_others, new, model, patch)
        if old is None:
            continue
        if (old, own_others) == (new, others):
            return None
        words = [_arrow(old, new)] if old != new else []
        words += ["zeros for tokens without a patch"] if own_others != others else []
        return Fit(_resampler(old, new, own_others, others), ", ".join(words))
    return None


def _grid_of(number: int, own: Grid, model: Any, patch: Grid | None) -> Grid | None:
    """The grid that ``number`` positions of a file are: that of the published model, the model's own, or a square.

    Which of them it is is in no file; the order is timm's.
    """
    height, width = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 0, 0))[-2:]
    published = (height // patch[0], width // patch[1]) if patch else own
    for grid in (published, own):
        if number > 0 and prod(grid) == number:
            return grid
    side = _square_side(number)
    return (side, side) if side else None


def _patch_resampler(new: Shape) -> Callable[[Tensor], Tensor]:
    from timm.layers import resample_patch_embed

    def resample(weight_OIhw: Tensor) -> Tensor:
        resized_OIhw: Tensor = resample_patch_embed(weight_OIhw, list(new))
        return resized_OIhw

    return resample


def _resampler(old: Grid, new: Grid, own_others: int, others: int) -> Callable[[Tensor], Tensor]:
    from timm.layers import resample_abs_pos_embed

    def resample(positions_1PD: Tensor) -> Tensor:
        resized_1PD: Tensor = resample_abs_pos_embed(positions_1PD, list(new), list(old), own_others)
        # Adding nothing to a token is what a model does that has no position for it.
        rows_1PD = resized_1PD.new_zeros(1, others - own_others, resized_1PD.shape[2])
        return torch.cat([rows_1PD, resized_1PD], dim=1)

    return resample


def _fit_table(attention: nn.Module, found: Shape, wanted: Shape) -> Fit | None:
    from timm.layers import resize_rel_pos_bias_table

    window: Any = getattr(attention, "window_size", None)
    if window is None or len(found) != 2 or len(wanted) != 2 or found[1] != wanted[1]:
        return None
    new = (2 * window[0] - 1, 2 * window[1] - 1)
    # BEiT's three for the class token.
    others = wanted[0] - prod(new)
    side = _square_side(found[0] - others)
    # As many offsets to the left as to the right.
    if side is None or side % 2 == 0 or (side, side) == new:
        return None

    def resize(table_PH: Tensor) -> Tensor:
        resized_PH: Tensor = resize_rel_pos_bias_table(table_PH, tuple(window), wanted)
        return resized_PH

    return Fit(resize, _arrow((side, side), new))


def _square_side(number: int) -> int | None:
    side = isqrt(max(number, 0))
    return side if number > 0 and side * side == number else None


def _arrow(old: Sequence[int], new: Sequence[int]) -> str:
    return f"resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]}"
