"""Dealing samples out to ranks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from spt_dist import UserError
from spt_dist.data.batches import GlobalBatches, deal_samples
from spt_dist.data.digits import build_digits
from spt_dist.data.loader import load_batches


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 5), st.none() | st.integers(0, 9), st.integers(0, 3))
def test_ranks_together_see_each_sample_once_in_the_same_global_batches(
    num_samples: int, batch_size: int, world_size: int, seed: int | None, epoch: int
) -> None:
    whole = [dealt.indices for dealt in GlobalBatches(num_samples, batch_size, seed=seed).deal(epoch)]
    assert sorted(index for batch in whole for index in batch) == list(range(num_samples))
    ranks = [
        list(GlobalBatches(num_samples, batch_size, rank, world_size, seed).deal(epoch)) for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        counted = [i for part in parts for i, weight in zip(part.indices, part.weights, strict=True) if weight]
        assert sorted(counted) == sorted(batch)
        assert len({len(part.indices) for part in parts}) == 1, "every rank runs batches of the same size"
        assert {part.num_global for part in parts} == {len(batch)}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 5))
def test_one_pass_deals_every_sample_once(num_samples: int, batch_size: int, world_size: int) -> None:
    samples = list(range(100, 100 + num_samples))
    wanted = [samples[start : start + batch_size] for start in range(0, num_samples, batch_size)]
    for same_batches in (True, False):
        ranks = [deal_samples(samples, batch_size, rank, world_size, same_batches) for rank in range(world_size)]
        batches = [dealt.indices for rank in ranks for dealt in rank]
        assert sorted(sample for batch in batches for sample in batch) == samples
        assert all(
            each.weights == [1.0] * each.num_global == [1.0] * len(each.indices) for rank in ranks for each in rank
        )
        if same_batches:
            assert sorted(batches) == wanted
            assert all(rank == sorted(rank, key=lambda dealt: dealt.indices) for rank in ranks)
        else:
            sizes = [sum(dealt.num_global for dealt in rank) for rank in ranks]
            assert max(sizes) - min(sizes) <= 1
            assert all(dealt.num_global <= batch_size for rank in ranks for dealt in rank)


def test_epochs_differ_and_repeat() -> None:
    batches = GlobalBatches(20, 4, seed=3)
    first, second = list(batches.deal(0)), list(batches.deal(1))
    assert first != second
    assert first == list(batches.deal(0))
    assert list(batches.deal(0, first_step=2)) == first[2:]


def test_batches_carry_the_samples() -> None:
    dataset = TensorDataset(torch.arange(10.0).unsqueeze(1), torch.arange(10))
    for batch in load_batches(dataset, GlobalBatches(10, 4, rank=1, world_size=2).epoch(), torch.device("cpu")):
        assert torch.equal(batch.inputs.flatten().long(), batch.targets)
        assert batch.weights.sum() == len(batch.targets)


def test_digits_are_split_without_overlap() -> None:
    task = build_digits(image_size=32, num_train=1000)
    assert (task.num_train, task.num_val, task.num_classes) == (1000, 797, 10)
    images = torch.stack([task.train[i][0] for i in range(1000)])
    held_out = torch.stack([task.val[i][0] for i in range(797)])
    assert images.shape == (1000, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    seen = {image.numpy().tobytes() for image in images}
    assert not any(image.numpy().tobytes() in seen for image in held_out)


class Unreadable(Dataset[Any]):
    """Its third sample is a mistake of the user's."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 2:
            raise UserError("images/3.jpg: is cut off; mend it")
        return torch.ones(1), index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_told_in_one_line_also_by_a_worker(num_workers: int) -> None:
    dealt = GlobalBatches(4, 2).epoch()
    with pytest.raises(UserError) as raised:
        list(load_batches(Unreadable(num_workers), dealt, torch.device("cpu")))
    assert str(raised.value) == "images/3.jpg: is cut off; mend it"


@given(num_samples=st.integers(1, 40), batch_size=st.integers(1, 12))
def test_only_full_batches_leave_out_the_rest_of_an_epoch(num_samples: int, batch_size: int) -> None:
    batches = GlobalBatches(num_samples, batch_size, seed=1, only_full=True)
    dealt = list(batches.deal())
    assert len(dealt) == batches.steps_per_epoch == num_samples // batch_size
    assert all(len(each.indices) == batch_size == each.num_global for each in dealt)
    assert dealt == list(GlobalBatches(num_samples, batch_size, seed=1).deal())[: len(dealt)]
