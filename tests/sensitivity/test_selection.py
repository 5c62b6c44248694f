"""The distributed selection against torch.topk and a stable sort."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spt_dist import UserError
from spt_dist.sensitivity.selection import count_selected, selected_positions, solve_threshold, top_tau
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, shard_bounds
from tests.ranks import run_ranks

INDEX = FlatIndex(("a", "b", "c"), ((3, 4), (5,), (2, 2)))
SCORES = st.lists(
    st.sampled_from([0.0, 1e-45, 1e-40, 1e-10, 0.5, 0.5000001, 1.0, 2.0**127]) | st.floats(0, 2.0**127, width=32),
    min_size=INDEX.total,
    max_size=INDEX.total,
)


def my_shard(values: Tensor) -> ScoreShard:
    """This rank's part of some scores."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    start, stop = shard_bounds(INDEX.total, size, rank)
    return ScoreShard(INDEX, start, values[start:stop].clone())


def stable_top(values: Tensor, tau: int) -> set[int]:
    """Flat indices of the highest scores, equal ones in the order of their index."""
    return set(values.argsort(descending=True, stable=True)[:tau].tolist())


def selected(values: Tensor, tau: int) -> set[int]:
    """Flat indices of what ``top_tau`` selects."""
    shard = my_shard(values)
    threshold = top_tau(shard, tau)
    positions = selected_positions(shard, threshold, INDEX.names)
    counts = count_selected(shard, threshold)
    assert counts.tolist() == [len(positions[name]) for name in INDEX.names]
    starts = dict(zip(INDEX.names, INDEX.offsets, strict=False))
    return {starts[name] + int(place) for name, places in positions.items() for place in places}


@settings(max_examples=200, deadline=None)
@given(SCORES, st.integers(0, INDEX.total))
def test_top_tau_is_a_stable_sort(scores: list[float], tau: int) -> None:
    values = torch.tensor(scores)
    assert selected(values, tau) == stable_top(values, tau)


def test_distinct_scores_agree_with_topk() -> None:
    values = torch.rand(INDEX.total).exp()
    for tau in range(INDEX.total + 1):
        assert selected(values, tau) == set(values.topk(tau).indices.tolist())


@pytest.mark.parametrize("tau", [-1, INDEX.total + 1])
def test_tau_out_of_range_is_refused(tau: int) -> None:
    with pytest.raises(UserError, match=f"tau={tau}"):
        top_tau(my_shard(torch.rand(INDEX.total)), tau)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.integers(0, 60), st.integers(1, 3), st.integers(0, 6))
def test_budget_is_met_exactly(scores: list[float], limit: int, price: int, jump: int) -> None:
    """Against a walk over every tau: the largest one whose total is within the limit."""
    values = torch.tensor(scores)

    def total(counts: Tensor) -> int:
        # Each weight costs `price`; the first tensor jumps to a fixed cost once half of it is selected.
        first = price * int(counts[0])
        return (max(first, 6 * price + jump) if counts[0] >= 6 else first) + price * int(counts[1:].sum())

    shard = my_shard(values)
    fitting = [tau for tau in range(INDEX.total + 1) if total(count_selected(shard, top_tau(shard, tau))) <= limit]
    found = solve_threshold(shard, total, limit)
    counts = count_selected(shard, found)
    assert total(counts) <= limit
    assert int(counts.sum()) == max(fitting)
    assert torch.equal(counts, count_selected(shard, top_tau(shard, max(fitting))))


def select_many(cases: list[tuple[Tensor, int]]) -> list[set[int]]:
    """What this rank says is selected in each case."""
    return [selected(values, tau) for values, tau in cases]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_selects_what_one_process_does(world_size: int) -> None:
    ties = torch.tensor([0.0, 1.0, 1.0] * 7)
    some = [torch.zeros(INDEX.total), torch.full((INDEX.total,), 2.5), ties, torch.rand(INDEX.total), -ties * 0.0]
    cases = [(values, tau) for values in some for tau in (0, 1, 8, 13, INDEX.total)]
    wanted = [stable_top(values, tau) for values, tau in cases]
    assert select_many(cases) == wanted
    assert run_ranks(select_many, world_size, cases) == [wanted] * world_size
