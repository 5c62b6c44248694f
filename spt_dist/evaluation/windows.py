"""A segmentation model's logits for one whole image, taken window by window where it is slid over, as mmseg does.

Shape suffixes: N windows, C channels, K classes, H height, W width of the image; h, w of a window or of what a model
gives for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.errors import UserError

# Images (N, C, h, w) -> logits of each head, the decode head's first.
Forward = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Windows:
    """Equally large windows that cover an image.

    Attributes:
        corners: top and left pixel of each, row by row.
        height, width: of a window; the image's own where that is smaller than the crop.
    """

    corners: list[tuple[int, int]]
    height: int
    width: int

    def cut(self, image_CHW: Tensor, first: int, last: int) -> Tensor:
        """Windows ``first`` to ``last - 1`` of the image: ``(N, C, h, w)``."""
        chosen = self.corners[first:last]
        return torch.stack([image_CHW[:, top : top + self.height, left : left + self.width] for top, left in chosen])

    def num_passes(self, windows_per_pass: int) -> int:
        """Forward passes that it takes to see all of them."""
        return -(-len(self.corners) // windows_per_pass)


def lay_windows(size: Sequence[int], test_cfg: Mapping[str, Any]) -> Windows:
    """The windows in which mmseg would look at an image.

    Args:
        size: height and width of the image.
        test_cfg: mmseg's; ``mode`` "whole", or "slide" with ``crop_size`` and ``stride``, each ``(height, width)``.

    Raises:
        UserError: the stride leaves pixels between windows that no window covers.
    """
    if test_cfg["mode"] != "slide":
        return Windows([(0, 0)], size[0], size[1])
    crop_size, stride = test_cfg["crop_size"], test_cfg["stride"]
    if any(step > crop for step, crop in zip(stride, crop_size, strict=True)):
        raise UserError(
            f"config: model.kwargs.test_cfg: stride={tuple(stride)} is larger than crop_size={tuple(crop_size)}, so "
            "that pixels between the windows are never seen; make the stride smaller"
        )
    tops, lefts = (_starts(*axis) for axis in zip(size, crop_size, stride, strict=True))
    corners = [(top, left) for top in tops for left in lefts]
    return Windows(corners, *(min(side, crop) for side, crop in zip(size, crop_size, strict=True)))


def image_logits(forward: Forward, module: nn.Module, image_CHW: Tensor, windows_per_pass: int) -> Tensor:
    """The decode head's logits at each pixel: the mean over the windows that see it.

    Runs ``lay_windows(...).num_passes(windows_per_pass)`` forward passes.

    Args:
        forward: the engine, or the model itself.
        module: the model: its ``test_cfg``, ``align_corners`` and ``out_channels``.
        image_CHW: fp32.
        windows_per_pass: most windows in a forward pass.

    Returns:
        fp32 ``(K, H, W)``.

    Raises:
        UserError: as ``lay_windows``.
    """
    size_HW = image_CHW.shape[1:]
    windows = lay_windows(size_HW, module.test_cfg)  # type: ignore[arg-type]
    # fp32 also where the model computes in less.
    sums_KHW = torch.zeros(int(module.out_channels), *size_HW, device=image_CHW.device)  # type: ignore[arg-type]
    counts_HW = torch.zeros(size_HW, device=image_CHW.device)
    for first in range(0, len(windows.corners), windows_per_pass):
        last = first + windows_per_pass
        logits_NKhw = forward(windows.cut(image_CHW, first, last))[0]
        # One by one: enlarged, all windows of a pass would take more memory than the pass did.
        for (top, left), logits_Khw in zip(windows.corners[first:last], logits_NKhw, strict=True):
            place = (..., slice(top, top + windows.height), slice(left, left + windows.width))
            sums_KHW[place] += enlarge(logits_Khw, (windows.height, windows.width), module)
            counts_HW[place] += 1
    return sums_KHW.div_(counts_HW)


def enlarge(logits_Khw: Tensor, size: tuple[int, int], module: nn.Module) -> Tensor:
    """Logits at another size ``(H, W)``, interpolated as the model's heads are trained: fp32 ``(K, H, W)``."""
    align_corners = bool(module.align_corners)
    return F.interpolate(logits_Khw[None].float(), size, mode="bilinear", align_corners=align_corners)[0]


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows start along one axis; the last is shifted back so that it ends with the image."""
    last = max(length - crop, 0)
    return [min(step * stride, last) for step in range(-(-last // stride) + 1)]
