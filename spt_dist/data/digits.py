"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels, a copy of which comes with the package.

They are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, CC BY 4.0). scikit-learn itself would add a second and a half to the start of every rank.

Shape suffixes: N images, C channels, H height, W width.
"""

from importlib.resources import files

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from spt_dist.data.task import Task
from spt_dist.errors import UserError

NUM_DIGITS = 1797


def read_digits() -> tuple[Tensor, Tensor]:
    """All digits in scikit-learn's order: images ``(1797, 8, 8)`` from 0 to 16 and labels ``(1797,)``, both uint8."""
    tensors = load((files("spt_dist") / "assets" / "digits.safetensors").read_bytes())
    return tensors["images"], tensors["labels"]


def build_digits(image_size: int = 32, num_train: int = 1000, num_val: int | None = None, seed: int = 0) -> Task:
    """The digits as a classification task of ten classes.

    Images are enlarged bilinearly, repeated over three channels and normalised with mean and deviation 0.5.

    Args:
        image_size: height and width in pixels.
        num_train: how many images train; the others are held out. 1,000 as in VTAB-1k.
        num_val: how many of those held out are used; ``None`` for all of them.
        seed: of the split.

    Raises:
        UserError: there are not so many images, or ``image_size`` is below 1.
    """
    if not 0 < num_train < NUM_DIGITS:
        raise UserError(f"config: data.num_train={num_train} has to lie between 1 and {NUM_DIGITS - 1}")
    num_held_out = NUM_DIGITS - num_train
    if num_val is not None and not 0 < num_val <= num_held_out:
        raise UserError(f"config: data.num_val={num_val} has to lie between 1 and {num_held_out}, the images held out")
    if image_size < 1:
        raise UserError(f"config: data.image_size={image_size} has to be at least 1")
    images_NHW, labels_N = read_digits()
    order = torch.randperm(NUM_DIGITS, generator=torch.Generator().manual_seed(seed))
    chosen = order[: num_train + (num_val or num_held_out)]
    images_N1HW = images_NHW[chosen].float().unsqueeze(1) / 16
    images_N1HW = F.interpolate(images_N1HW, (image_size, image_size), mode="bilinear", align_corners=False)
    images_NCHW = ((images_N1HW - 0.5) / 0.5).repeat(1, 3, 1, 1)
    labels_N = labels_N[chosen].long()
    return Task(
        train=TensorDataset(images_NCHW[:num_train], labels_N[:num_train]),
        val=TensorDataset(images_NCHW[num_train:], labels_N[num_train:]),
        num_train=num_train,
        num_val=len(chosen) - num_train,
        num_classes=10,
    )
