"""MixUp and CutMix in a step."""

import pytest
import torch
from torch.utils.data import TensorDataset

from spt_dist import UserError
from spt_dist.data.loader import Batch
from spt_dist.data.task import SEGMENTATION, Task
from spt_dist.models.losses import sample_losses
from spt_dist.sections import TrainConfig
from spt_dist.training.mixing import make_mixing

NUM_CLASSES = 4
IMAGES = TensorDataset(torch.zeros(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64))
TASK = Task(IMAGES, IMAGES, 6, 6, NUM_CLASSES)


def make_batch() -> Batch:
    """Each image is filled with its label, in every pixel."""
    labels = torch.tensor([0, 1, 2, 3, 1, 2])
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return Batch(images, labels, torch.ones(6), 6, list(range(6)))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_label_s_shares_are_those_of_the_pixels(kind: str) -> None:
    mixing = make_mixing(TrainConfig(epochs=1, **{kind: 1.0}), TASK)  # type: ignore[arg-type]
    assert mixing is not None
    changed = 0
    for seed in range(8):
        torch.manual_seed(seed)
        batch = mixing(make_batch())
        assert batch.targets.shape == (6, NUM_CLASSES)
        torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(6))
        # The mean over the pixels is the mean of the labels, by their shares.
        wanted = batch.targets @ torch.arange(4.0)
        torch.testing.assert_close(batch.inputs.mean(dim=(1, 2, 3)), wanted)
        changed += bool((batch.inputs != make_batch().inputs).any())
    assert changed >= 6


def test_loss_of_mixed_labels_is_the_mean_of_the_losses() -> None:
    logits = torch.randn(3, NUM_CLASSES, dtype=torch.float64)
    shares = torch.softmax(torch.randn(3, NUM_CLASSES), dim=1)
    logs = logits - logits.exp().sum(dim=1, keepdim=True).log()
    found = sample_losses(torch.nn.Identity())(logits, shares)
    torch.testing.assert_close(found, -(shares * logs).sum(dim=1).float())


def test_nothing_is_mixed_unless_asked_for() -> None:
    assert make_mixing(TrainConfig(epochs=1), TASK) is None


def test_segmentation_is_refused() -> None:
    task = Task(IMAGES, IMAGES, 6, 6, NUM_CLASSES, SEGMENTATION)
    with pytest.raises(UserError, match=r"train\.mixup=0\.2"):
        make_mixing(TrainConfig(epochs=1, mixup=0.2), task)
