"""The distributed selection against torch.topk, a stable sort and a walk over every tau."""

import pickle
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from math import prod
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spt_dist import UserError
from spt_dist.sensitivity.selection import (
    NOTHING,
    Threshold,
    count_selected,
    selected_positions,
    solve_threshold,
    top_tau,
)
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, get_rank, restrict, shard_bounds, world_size
from tests.ranks import run_ranks

# Below and above a block of neighbours (32 scores), whole blocks and odd ends, and a name of one weight.
INDEX = FlatIndex(("a", "b", "c", "d", "e"), ((13, 11), (5,), (8, 16), (1,), (7, 9)))
COLLECTIVES = (
    "all_gather",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "scatter",
)


def make_scores(kind: str, seed: int, total: int = INDEX.total) -> Tensor:
    """Scores of one of several distributions, plain to hostile."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randn(total, generator=generator).square()
    some = torch.rand(total, generator=generator)
    pool = torch.tensor([0.0, -0.0, 1e-45, 3e-45, 1e-40, 1e-10, 0.5, 0.50000006, 2.0**127])
    return {
        "squares": squares,
        "rows": squares * (1e4 ** torch.arange(total).div(20, rounding_mode="floor").sin()),
        "denormal": squares * 1e-40,
        "few": (some * 4).floor() / 3,
        "pool": pool[(some * len(pool)).long()],
        "zeros": torch.where(some < 0.9, 0.0, squares),
        "equal": torch.full((total,), 2.5),
        "all zero": torch.zeros(total),
        "neighbours": (0x3F800000 + (some * 3).int()).view(torch.float32),
        "one outlier": torch.where(torch.arange(total) == total // 2, 3e38, 1e-30),
    }[kind]


KINDS = (
    "squares",
    "rows",
    "denormal",
    "few",
    "pool",
    "zeros",
    "equal",
    "all zero",
    "neighbours",
    "one outlier",
)
SCORES = st.builds(make_scores, st.sampled_from(KINDS), st.integers(0, 2**32))


def my_shard(values: Tensor, cuts: Sequence[int] | None = None) -> ScoreShard:
    """This rank's part of some scores: an equal one, or what lies between two of the ``world_size + 1`` cuts."""
    start, stop = cuts[get_rank() :][:2] if cuts else shard_bounds(INDEX.total, world_size(), get_rank())
    return ScoreShard(INDEX, start, values[start:stop].clone())


def stable_top(values: Tensor, tau: int) -> set[int]:
    """Flat indices of the highest scores, equal ones in the order of their index."""
    return set(values.argsort(descending=True, stable=True)[:tau].tolist())


def chosen(shard: ScoreShard, threshold: Threshold) -> set[int]:
    """Flat indices of the weights that a threshold selects."""
    positions = selected_positions(shard, threshold, shard.index.names)
    assert count_selected(shard, threshold).tolist() == [len(positions[name]) for name in shard.index.names]
    some = selected_positions(shard, threshold, shard.index.names[1::2])
    assert list(some) == list(shard.index.names[1::2])
    assert all(torch.equal(some[name], positions[name]) for name in some)
    starts = dict(zip(shard.index.names, shard.index.offsets, strict=False))
    for places in positions.values():
        assert places.dtype == torch.int64 and torch.equal(places, places.sort().values)
    return {starts[name] + int(place) for name, places in positions.items() for place in places}


def total(counts: Tensor) -> int:
    """Trainable weights as an allocation counts them: rank-1 LoRA where it is cheaper, a vector whole from a third."""
    cost = 0
    for shape, count in zip(INDEX.shapes, counts.tolist(), strict=True):
        if len(shape) == 2:
            cost += min(count, sum(shape))
        else:
            cost += prod(shape) if 3 * count >= prod(shape) else count
    return cost


def largest_within(values: Tensor, limit: int) -> int:
    """The largest tau whose total is within the limit, by trying each."""
    name_of = torch.repeat_interleave(torch.tensor([prod(shape) for shape in INDEX.shapes]))
    order = values.argsort(descending=True, stable=True)
    steps = torch.nn.functional.one_hot(name_of[order], len(INDEX.names))
    counts_of_tau = torch.cat([torch.zeros_like(steps[:1]), steps.cumsum(0)])
    return max(tau for tau, counts in enumerate(counts_of_tau) if total(counts) <= limit)


@settings(max_examples=200, deadline=None)
@given(SCORES, st.integers(0, INDEX.total) | st.sampled_from([0, 1, INDEX.total]))
def test_top_tau_is_a_stable_sort(values: Tensor, tau: int) -> None:
    shard = my_shard(values)
    assert chosen(shard, top_tau(shard, tau)) == stable_top(values, tau)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 2.0**127, width=32), min_size=21, max_size=21), st.integers(0, 21))
def test_any_floats(scores: list[float], tau: int) -> None:
    values = torch.tensor(scores)
    shard = ScoreShard(FlatIndex(("a", "b", "c"), ((3, 4), (5,), (2, 2))), 0, values)
    assert chosen(shard, top_tau(shard, tau)) == stable_top(values, tau)


def test_distinct_scores_agree_with_topk() -> None:
    values = torch.randperm(INDEX.total).float().exp2().clamp(max=2.0**127) + torch.rand(INDEX.total)
    values = values.unique()[torch.randperm(len(values.unique()))]
    shard = ScoreShard(FlatIndex(("a",), ((len(values),),)), 0, values)
    for tau in range(len(values) + 1):
        assert chosen(shard, top_tau(shard, tau)) == set(values.topk(tau).indices.tolist())


def test_the_threshold_is_the_lowest_selected_score() -> None:
    values = make_scores("few", 0)
    for tau in range(1, INDEX.total + 1):
        lowest = values.sort(descending=True).values[tau - 1]
        wanted = Threshold(int(lowest.view(torch.int32)), tau - int((values > lowest).sum()))
        assert top_tau(my_shard(values), tau) == wanted


@pytest.mark.parametrize("tau", [-1, INDEX.total + 1])
def test_tau_out_of_range_is_refused(tau: int) -> None:
    with pytest.raises(UserError, match=f"tau={tau}"):
        top_tau(my_shard(torch.rand(INDEX.total)), tau)


def test_nothing_and_no_weights_at_all() -> None:
    assert chosen(my_shard(make_scores("pool", 0)), NOTHING) == set()
    empty = ScoreShard(FlatIndex((), ()), 0, torch.zeros(0))
    assert top_tau(empty, 0) == NOTHING
    assert chosen(empty, solve_threshold(empty, lambda counts: int(counts.sum()), 0)) == set()


@settings(max_examples=200, deadline=None)
@given(SCORES, st.integers(0, 130))
def test_a_budget_is_met_exactly(values: Tensor, limit: int) -> None:
    shard = my_shard(values)
    found = solve_threshold(shard, total, limit)
    assert total(count_selected(shard, found)) <= limit
    assert chosen(shard, found) == stable_top(values, largest_within(values, limit))


def test_a_budget_for_everything_takes_everything() -> None:
    for kind in KINDS:
        values = make_scores(kind, 1)
        shard = my_shard(values)
        assert chosen(shard, solve_threshold(shard, total, INDEX.total)) == set(range(INDEX.total))


Case = tuple[str, tuple[int, ...] | None]


def taus_and_limits(kind: str) -> tuple[list[int], list[int]]:
    """None, one, all and one in between; a small budget and a large one."""
    place = KINDS.index(kind)
    return [0, 1, INDEX.total, 20 + 30 * place], [5 + 2 * place, 70]


def solve_many(cases: list[Case]) -> list[list[set[int]]]:
    """What this rank says is selected in each case, by several taus and by several limits."""
    results = []
    for kind, cuts in cases:
        shard = my_shard(make_scores(kind, 7), cuts)
        taus, limits = taus_and_limits(kind)
        thresholds = [top_tau(shard, tau) for tau in taus]
        thresholds += [solve_threshold(shard, total, limit) for limit in limits]
        results.append([chosen(shard, threshold) for threshold in thresholds])
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_selects_what_a_stable_sort_does(world_size: int) -> None:
    generator = torch.Generator().manual_seed(world_size)
    cases: list[Case] = [("few", None), ("zeros", None)]
    for kind in KINDS:
        inner = torch.randint(INDEX.total + 1, (world_size - 1,), generator=generator).sort().values.tolist()
        cases.append((kind, (0, *inner, INDEX.total)))
    # One rank owns everything, the first or the last.
    cases += [("pool", (0, *[INDEX.total] * world_size)), ("rows", (*[0] * world_size, INDEX.total))]
    wanted = []
    for kind, _ in cases:
        values = make_scores(kind, 7)
        taus, limits = taus_and_limits(kind)
        wanted.append([stable_top(values, tau) for tau in taus + [largest_within(values, limit) for limit in limits]])
    results = run_ranks(solve_many, world_size, cases) if world_size > 1 else [solve_many(cases)]
    for result in results:
        for case, got, want in zip(cases, result, wanted, strict=True):
            assert got == want, case


def measure_traffic(widths: list[int]) -> list[dict[str, list[int]]]:
    """For each width of a model: the bytes this rank passes to each collective, by collective."""
    traffic = []
    for width in widths:
        index = FlatIndex(tuple("abcdef"), ((width, width),) * 6)
        start, stop = shard_bounds(index.total, world_size(), get_rank())
        shard = ScoreShard(index, start, make_scores("squares", 0, index.total)[start:stop])
        with ExitStack() as stack:
            calls = {
                name: stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
                for name in COLLECTIVES
            }
            top_tau(shard, 40)
            threshold = solve_threshold(shard, lambda counts: int(counts.clamp(max=3).sum()), 12)
            count_selected(shard, threshold)
            selected_positions(shard, threshold, index.names)
            traffic.append({name: [payload(call.args) for call in spy.call_args_list] for name, spy in calls.items()})
    return traffic


def payload(arguments: tuple[object, ...]) -> int:
    """Bytes of a collective's input: its only tensor, or the last argument, an object."""
    assert len(arguments) <= 2
    return arguments[-1].nbytes if isinstance(arguments[-1], Tensor) else len(pickle.dumps(arguments[-1]))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_traffic_does_not_grow_with_the_model(world_size: int) -> None:
    for small, large in run_ranks(measure_traffic, world_size, [16, 256]):
        assert small["all_reduce"] == large["all_reduce"]
        # Two searches, each of them twice 11 sums at most; then one or two. No more than 15 integers a name.
        assert 22 < len(large["all_reduce"]) <= 4 * 11 + 2
        assert max(large["all_reduce"]) <= 15 * 6 * 8
        # Beside them only the few selected positions.
        assert {name for name, sizes in large.items() if sizes} == {"all_reduce", "all_gather_object"}
        assert len(large["all_gather_object"]) == 1
        assert large["all_gather_object"][0] < 6 * 1000


@st.composite
def cut_shards(draw: st.DrawFn) -> list[ScoreShard]:
    """The shards of one to four ranks, uneven, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, INDEX.total), max_size=3)))
    values = torch.arange(INDEX.total, dtype=torch.float32)
    return [ScoreShard(INDEX, start, values[start:stop]) for start, stop in pairwise([0, *cuts, INDEX.total])]


@given(cut_shards(), st.sets(st.sampled_from(INDEX.names)))
def test_restricted_shards_lie_end_to_end(shards: list[ScoreShard], names: set[str]) -> None:
    kept = [place for place, name in enumerate(INDEX.names) if name in names]
    smaller = [restrict(shard, names) for shard in shards]
    for shard in smaller:
        assert shard.index.names == tuple(INDEX.names[place] for place in kept)
        assert shard.index.shapes == tuple(INDEX.shapes[place] for place in kept)
    ends = [0, *(shard.start + len(shard.values) for shard in smaller)]
    assert [shard.start for shard in smaller] == ends[:-1]
    expected = [torch.arange(*INDEX.offsets[place : place + 2], dtype=torch.float32) for place in kept]
    assert torch.equal(torch.cat([shard.values for shard in smaller]), torch.cat([torch.zeros(0), *expected]))


def test_restricting_copies_only_where_a_name_in_between_is_left_out() -> None:
    shard = ScoreShard(INDEX, 3, torch.rand(INDEX.total - 3))
    storage = shard.values.untyped_storage().data_ptr()
    assert restrict(shard, INDEX.names) is shard
    assert restrict(shard, INDEX.names[1:]).values.untyped_storage().data_ptr() == storage
    assert restrict(shard, ["a", "c"]).values.untyped_storage().data_ptr() != storage
    with pytest.raises(KeyError, match="z"):
        restrict(shard, ["a", "z"])


@given(SCORES, st.sets(st.sampled_from(INDEX.names)), st.integers(0, 50))
def test_selecting_among_some_names_only(values: Tensor, names: set[str], tau: int) -> None:
    shard = restrict(my_shard(values), names)
    parts = [
        values[slice(*INDEX.offsets[place : place + 2])] for place, name in enumerate(INDEX.names) if name in names
    ]
    tau = min(tau, shard.index.total)
    assert chosen(shard, top_tau(shard, tau)) == stable_top(torch.cat([torch.zeros(0), *parts]), tau)
