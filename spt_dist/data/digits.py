"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels that ship inside the library.

Shape suffixes: N images, C channels, H height, W width.
"""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from spt_dist.data.task import Task
from spt_dist.errors import UserError

NUM_DIGITS = 1797


def build_digits(image_size: int = 32, num_train: int = 1000, seed: int = 0) -> Task:
    """The digits as a classification task of ten classes.

    Images are enlarged bilinearly, repeated over three channels and normalised with mean and deviation 0.5.

    Args:
        image_size: height and width in pixels.
        num_train: how many images train; the others are held out. 1,000 as in VTAB-1k.
        seed: of the split.

    Raises:
        UserError: ``num_train`` leaves no image on one side, or ``image_size`` is below 1.
    """
    if not 0 < num_train < NUM_DIGITS:
        raise UserError(f"config: data.num_train={num_train} has to lie between 1 and {NUM_DIGITS - 1}")
    if image_size < 1:
        raise UserError(f"config: data.image_size={image_size} has to be at least 1")
    digits = load_digits()
    images_N1HW = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images_N1HW = F.interpolate(images_N1HW, (image_size, image_size), mode="bilinear", align_corners=False)
    images_NCHW = ((images_N1HW - 0.5) / 0.5).repeat(1, 3, 1, 1)
    labels_N = torch.from_numpy(digits.target).long()
    order = torch.randperm(NUM_DIGITS, generator=torch.Generator().manual_seed(seed))
    train, val = order[:num_train], order[num_train:]
    return Task(
        train=TensorDataset(images_NCHW[train], labels_N[train]),
        val=TensorDataset(images_NCHW[val], labels_N[val]),
        num_train=len(train),
        num_val=len(val),
        num_classes=10,
    )
