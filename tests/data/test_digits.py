"""The copy of scikit-learn's digits is one."""

import torch
from sklearn.datasets import load_digits

from spt_dist.data.digits import NUM_DIGITS, read_digits


def test_the_digits_are_scikit_learns() -> None:
    images_NHW, labels_N = read_digits()
    known = load_digits()
    assert images_NHW.shape == (NUM_DIGITS, 8, 8)
    assert torch.equal(images_NHW.double(), torch.from_numpy(known.images))
    assert torch.equal(labels_N.long(), torch.from_numpy(known.target))
