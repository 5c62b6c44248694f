"""NaN and infinity are traced to a layer and a sample; float16 gets a loss scale."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import estimate_sensitivity
from spt_dist.sensitivity.diagnosis import NotFiniteError
from tests.models_for_tests import make_samples, make_vit, pick
from tests.ranks import run_ranks
from tests.sensitivity.oracle import one_by_one, relative_error


@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [(torch.bfloat16, 1.0, 0.05), (torch.float16, 1.0, 0.01), (torch.float16, 1e-6, 0.01), (torch.float16, 1e6, 0.01)],
)
def test_autocast_is_close(dtype: torch.dtype, size: float, tolerance: float) -> None:
    """In float16 also for losses whose gradients would vanish or overflow without a scale."""
    model = make_vit(init_values=0.1)
    images, labels = make_samples(6)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return size * F.cross_entropy(outputs, targets)

    exact = one_by_one(model, images, labels, loss_fn)
    scores = estimate_sensitivity(model, [(images, labels)], loss_fn, dtype=dtype)
    for name in scores.names:
        assert scores[name].dtype == torch.float32
        if not name.endswith("attn.k.bias"):
            assert relative_error(scores[name], pick(exact, name)) < tolerance, name


def break_weight(model: nn.Module, images: Tensor) -> None:
    """NaN on the way forward, for every sample."""
    model.get_parameter("blocks.1.mlp.fc1.weight").data[0, 0] = float("nan")


def break_image(model: nn.Module, images: Tensor) -> None:
    """Infinity in one sample."""
    images[4, 0, 0, 0] = float("inf")


def huge_loss_of_class_3(outputs: Tensor, targets: Tensor) -> Tensor:
    """A finite loss whose squared gradients overflow for one class."""
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return torch.where(targets == 3, losses * 1e30, losses)


def log_of_class_3(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that is infinite for one class."""
    return F.cross_entropy(outputs, targets, reduction="none") - torch.log((targets != 3).float())


BREAKS: list[tuple[Any, Any, str]] = [
    (break_weight, F.cross_entropy, r"blocks\.1\.mlp\.fc1: its output is NaN or infinite, for sample 0"),
    (break_image, F.cross_entropy, r"the inputs hold NaN or infinity, for sample 4"),
    (None, huge_loss_of_class_3, r"norm: its scores are NaN or infinite \(in float16.*\), for sample 5"),
    (None, log_of_class_3, r"the loss is NaN or infinite, though every layer's output is finite, for sample 5"),
]


@pytest.mark.parametrize(("damage", "loss_fn", "message"), BREAKS)
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_scores_that_are_not_finite_name_layer_and_sample(
    damage: Any, loss_fn: Any, message: str, micro_batch: int | None
) -> None:
    model, (images, _) = make_vit(), make_samples(7)
    labels = torch.tensor([0, 1, 2, 4, 5, 3, 6])
    if damage is not None:
        damage(model, images)
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    with pytest.raises(NotFiniteError, match=message + " of rank 0"):
        estimate_sensitivity(model, batches, loss_fn, micro_batch=micro_batch)


def score_a_broken_share(shard_sums: bool) -> tuple[str, int, int]:
    """Rank 1's second sample has an infinite pixel; what every rank says about it."""
    images, labels = make_samples(3 + dist.get_rank())
    if dist.get_rank() == 1:
        images[1, 0, 0, 0] = float("inf")
    try:
        estimate_sensitivity(make_vit(), [(images, labels)], F.cross_entropy, micro_batch=1, shard_sums=shard_sums)
    except NotFiniteError as error:
        return str(error), error.rank, error.position
    raise AssertionError("not refused")


@pytest.mark.distributed
@pytest.mark.parametrize("shard_sums", [False, True])
def test_every_rank_hears_of_a_broken_sample(shard_sums: bool) -> None:
    said = run_ranks(score_a_broken_share, 2, shard_sums)
    assert said[0] == said[1]
    assert "the inputs hold NaN or infinity, for sample 1 of rank 1" in said[0][0]
    assert said[0][1:] == (1, 1)
