"""Tiny segmentation models and a set of images in memory.

Shape suffixes: B images, C channels, K classes, H height, W width; h, w of a window or of a head's own resolution.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

CLASSES = ("wall", "chest of drawers", "sky", "floor", "tree", "never seen")
PALETTE = [[150, 5, 61], [180, 40, 40], [6, 230, 230], [80, 50, 50], [4, 200, 3], [255, 255, 0]]
# Images of several sizes: with SLIDE they take 1, 6, 2, 4 and 9 windows.
SIZES = [(24, 20), (40, 61), (32, 48), (50, 44), (60, 60)]
SLIDE = {"mode": "slide", "crop_size": (32, 32), "stride": (21, 20)}


class TinyNet(nn.Module):
    """A convolution of stride 4 with batch norm and dropout, and an auxiliary output; counts its forward passes."""

    def __init__(self, test_cfg: dict[str, Any], num_classes: int = len(CLASSES)) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 8, stride=4, padding=2), nn.BatchNorm2d(8), nn.GELU())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, num_classes, 3, padding=1))
        self.test_cfg, self.align_corners, self.out_channels = test_cfg, False, num_classes
        # How many windows each forward pass had.
        self.passes: list[int] = []

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits, and again in reverse."""
        self.passes.append(len(images_BCHW))
        logits_BKhw = 4 * self.head(self.stem(images_BCHW))
        return logits_BKhw, logits_BKhw.flip(1)


def make_setr(test_cfg: dict[str, Any], align_corners: bool = False) -> nn.Module:
    """A SETR of mmseg's own parts, two blocks of width 24, whose forward gives a tuple of logits."""
    from mmengine.config import ConfigDict
    from mmseg.models import EncoderDecoder

    class Setr(EncoderDecoder):  # type: ignore[misc]
        def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
            return (self.decode_head(self.extract_feat(images_BCHW)),)

    torch.manual_seed(5)
    size = {"embed_dims": 24, "num_layers": 2, "num_heads": 2, "out_indices": (1,), "with_cls_token": True}
    backbone = {"type": "VisionTransformer", "img_size": (32, 32), "patch_size": 8, **size}
    head = {"type": "SETRUPHead", "in_channels": 24, "channels": 8, "in_index": 0, "num_convs": 1, "up_scale": 4}
    head |= {"num_classes": len(CLASSES), "norm_cfg": {"type": "BN"}, "align_corners": align_corners}
    model = Setr(backbone, {**head, "dropout_ratio": 0.5}, test_cfg=ConfigDict(test_cfg))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval()
    return model


class FakeSet:
    """As ``spt_dist.data.ade20k.SegmentationSet``: coloured noise, labelled in blocks, partly ignored."""

    classes, palette = CLASSES, PALETTE
    num_workers = 0

    def __init__(self, sizes: Sequence[tuple[int, int]] = tuple(SIZES)) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images, self.labels = [], []
        for height, width in sizes:
            coarse = torch.randn(1, 3, height // 8 + 1, width // 8 + 1, generator=generator)
            self.images.append(2 * F.interpolate(coarse, (height, width), mode="bilinear")[0])
            # The last class never occurs; 255 does.
            blocks = torch.randint(6, (1, 1, height // 12 + 1, width // 12 + 1), generator=generator)
            blocks[blocks == 5] = 255
            self.labels.append(F.interpolate(blocks.float(), (height, width)).long()[0, 0])

    def __len__(self) -> int:
        return len(self.images)

    def paths(self, index: int) -> tuple[str, str]:
        """Of image and mask."""
        return f"images/validation/ADE_val_{index + 1:08d}.jpg", f"annotations/validation/ADE_val_{index + 1:08d}.png"

    def label(self, index: int) -> str:
        """What its pictures are called."""
        return f"ADE_val_{index + 1:08d}"

    def picture(self, index: int) -> NDArray[np.uint8]:
        """RGB, ``(H, W, 3)``."""
        return (self.images[index].sigmoid() * 255).byte().permute(1, 2, 0).numpy()

    def views(self, scales: Sequence[float]) -> "Views":
        """Items with one image for each scale."""
        return Views(self, scales)


class Views(Dataset[tuple[list[Tensor], Tensor]]):
    """Items are ``(images_CHW at each scale, label_HW)``."""

    def __init__(self, samples: FakeSet, scales: Sequence[float]) -> None:
        self.samples, self.scales = samples, scales

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor]:
        image_CHW, label_HW = self.samples.images[index], self.samples.labels[index]
        sizes = [tuple(round(side * scale) for side in label_HW.shape) for scale in self.scales]
        return [F.interpolate(image_CHW[None], size, mode="bilinear")[0] for size in sizes], label_HW
