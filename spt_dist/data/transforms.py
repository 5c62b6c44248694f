"""How the papers cut and normalise images, by name.

All of these take a PIL image, and give what the published code gives to the last bit; or a uint8 tensor, on any device.

Shape suffixes: C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from spt_dist.config import lookup
from spt_dist.normalisation import NORMALISATIONS, Normalisation

Spatial = Callable[[Any], Any]
"""From an RGB image of any size to a square: a PIL image, or a tensor ``(3, H, W)`` in grey levels from 0 to 255."""

_IMAGENET: Final = NORMALISATIONS["imagenet"]
_INCEPTION: Final = NORMALISATIONS["inception"]


@dataclass(frozen=True)
class NamedTransform:
    """One way to see images.

    Attributes:
        held_out: edge of the square in pixels -> what is done to held-out images; nothing in it is random.
        train: the same for training images, random; ``None`` where they are seen as held-out images are.
        normalisation: what comes last, where nothing else is asked for.
        is_whole: whether the name stands for the normalisation as well, so that a backbone's own does not replace it.
    """

    held_out: Callable[[int], Spatial]
    train: Callable[[int], Spatial] | None
    normalisation: Normalisation
    is_whole: bool = False


class LegacyBilinear:
    """Resizes to a square as TensorFlow 1 did: pixels have corners instead of centres, and nothing is smoothed.

    The result is fp32, and not rounded.

    Args:
        size: edge of the square in pixels.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, image: Any) -> Tensor:
        image_CHW: Tensor = image if isinstance(image, Tensor) else pil_to_tensor(image)
        return self._along(self._along(image_CHW.float(), 2), 1)

    def _along(self, image_CHW: Tensor, axis: int) -> Tensor:
        length = image_CHW.shape[axis]
        # TensorFlow multiplies in fp32, which decides between two pixels where a place is nearly a whole number.
        places = torch.arange(self._size, dtype=torch.float32) * (torch.tensor(float(length)) / self._size)
        lower = places.long()
        upper = (lower + 1).clamp(max=length - 1)
        share = (places - lower).to(image_CHW.device).view(-1, *[1] * (2 - axis))
        start = image_CHW.index_select(axis, lower.to(image_CHW.device))
        end = image_CHW.index_select(axis, upper.to(image_CHW.device))
        return start + (end - start) * share


def _square(size: int) -> Spatial:
    resize: Spatial = v2.Resize((size, size), InterpolationMode.BICUBIC)
    return resize


def _middle(resize: Any, size: int) -> Spatial:
    pipeline: Spatial = v2.Compose([resize, v2.CenterCrop(size)])
    return pipeline


def _crop_and_flip(resize: Any, size: int) -> Spatial:
    pipeline: Spatial = v2.Compose([resize, v2.RandomCrop(size), v2.RandomHorizontalFlip()])
    return pipeline


def _resized_crop_and_flip(crop: Any) -> Spatial:
    pipeline: Spatial = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return pipeline


def _larger(size: int) -> int:
    """The edge from which crops are cut: 256 pixels for 224, 438 for 384, 512 for 448."""
    return size * 256 // 224


def _ssf_crop(size: int) -> Any:
    modes = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
    return v2.RandomChoice([v2.RandomResizedCrop(size, interpolation=mode) for mode in modes])


TRANSFORMS: Final[dict[str, NamedTransform]] = {
    # ziplab/SPT and ZhangYuanhan-AI/NOAH, lib/datasets.py with --no_aug --direct_resize.
    "vtab": NamedTransform(_square, None, _IMAGENET),
    # The same with --inception: NOAH's search and its VPT; DyT.
    "vtab_inception": NamedTransform(_square, None, _INCEPTION, is_whole=True),
    # Bi-Adapter.
    "vtab_raw": NamedTransform(_square, None, NORMALISATIONS["none"], is_whole=True),
    # KMnP/vpt, src/data/datasets/tf_dataset.py: `tensorflow.compat.v1`'s tf.image.resize; so does E2VPT.
    "vtab_vpt": NamedTransform(LegacyBilinear, None, _IMAGENET, is_whole=True),
    # dongzelian/SSF, data/transforms_factory.py with --no-aug --direct-resize and its backbone's settings in timm; HST.
    "vtab_ssf": NamedTransform(
        lambda size: _middle(v2.Resize(size, InterpolationMode.BICUBIC), size), None, _INCEPTION, is_whole=True
    ),
    # KMnP/vpt, src/data/transforms.py.
    "fgvc": NamedTransform(
        lambda size: _middle(v2.Resize(_larger(size)), size),
        lambda size: _crop_and_flip(v2.Resize(_larger(size)), size),
        _IMAGENET,
    ),
    # ziplab/SPT, lib/datasets.py with --no_aug: as VPT, but its resizing is bicubic and to a square.
    "fgvc_spt": NamedTransform(
        lambda size: _middle(_square(_larger(size)), size),
        lambda size: _crop_and_flip(_square(_larger(size)), size),
        _IMAGENET,
    ),
    # What the papers of VPT and SPT say of training; held-out images as in VPT's code. Usual for ImageNet as well.
    "fgvc_paper": NamedTransform(
        lambda size: _middle(v2.Resize(_larger(size)), size),
        lambda size: _resized_crop_and_flip(v2.RandomResizedCrop(size)),
        _IMAGENET,
    ),
    # dongzelian/SSF with --simple-aug: each crop is resized by one of two ways, and 224 pixels are 0.9 of the edge.
    "fgvc_ssf": NamedTransform(
        lambda size: _middle(v2.Resize(int(size / 0.9), InterpolationMode.BICUBIC), size),
        lambda size: _resized_crop_and_flip(_ssf_crop(size)),
        _INCEPTION,
        is_whole=True,
    ),
}


def named_transform(name: str) -> NamedTransform:
    """One of ``TRANSFORMS``.

    Raises:
        UserError: there is none of this name; the nearest is named.
    """
    transform: NamedTransform = lookup("data.transform", name, TRANSFORMS)
    return transform
