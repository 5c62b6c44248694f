"""Top-1 over ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from spt_dist.data.task import Task
from spt_dist.evaluation.classification import evaluate_top1
from tests.models_for_tests import make_samples, make_vit
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def evaluate() -> float:
    """Top-1 of an untrained model on 23 samples in batches of 8."""
    samples = TensorDataset(*make_samples(23))
    model = make_vit(proj_drop_rate=0.5).train()
    top1 = evaluate_top1(model, model, Task(samples, samples, 23, 23, 10), 8, CPU)
    assert model.training
    return top1


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_sample_counts_once(world_size: int) -> None:
    images, labels = make_samples(23)
    model = make_vit(proj_drop_rate=0.5)
    hits = sum(int(model(images[i : i + 1]).argmax() == labels[i]) for i in range(23))
    assert hits > 0
    assert run_ranks(evaluate, world_size) == [pytest.approx(hits / 23)] * world_size
    assert not dist.is_initialized()
