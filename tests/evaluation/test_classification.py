"""Top-1 over ranks."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from spt_dist import UserError
from spt_dist.data.samples import BadSampleError, Item, SampleSet
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


class Halves(SampleSet):
    """Every second sample is bad, or all are; the others are of the class that the model says."""

    skip_bad = True

    def __init__(self, all_bad: bool) -> None:
        self.all_bad = all_bad

    def __len__(self) -> int:
        return 9

    def item(self, epoch: int | None, index: int) -> Item:
        if self.all_bad or index % 2:
            raise BadSampleError(f"{index}.jpg: is cut off")
        return torch.zeros(3), 1 if index else 0

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        return torch.stack(list(inputs))

    def blank(self) -> Item:
        return torch.zeros(3), 0


class SaysOne(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0]).expand(len(inputs), 2)


def halves(all_bad: bool) -> float | str:
    samples, model = Halves(all_bad), SaysOne()
    try:
        return evaluate_top1(model, model, Task(samples, samples, 9, 9, 2), 4, CPU)
    except UserError as error:
        return str(error)


@pytest.mark.distributed
def test_bad_held_out_samples_count_for_nothing() -> None:
    # Of the five good ones four have the class that the model says.
    assert run_ranks(halves, 2, False) == [halves(False)] * 2 == [0.8] * 2
    message = "none of the 9 held-out samples can be read, see the warnings above"
    assert run_ranks(halves, 2, True) == [halves(True)] * 2 == [message] * 2
