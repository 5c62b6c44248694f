"""The order in which samples of shards are visited."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_dist.data.batches import GlobalBatches, epoch_key
from spt_dist.data.shards.order import LaneOrder, deal_lanes

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


def shard_of(sizes: list[int]) -> list[int]:
    """The shard of each sample, by counting."""
    return [shard for shard, size in enumerate(sizes) for _ in range(size)]


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 20), st.integers(1, 50), st.none() | st.integers(0, 2**40))
def test_each_sample_once(sizes: list[int], num_lanes: int, window: int, epoch: int | None) -> None:
    order = LaneOrder(sizes, num_lanes, window)
    indices = order.order(epoch)
    assert sorted(indices.tolist()) == list(range(sum(sizes)))
    assert indices.equal(LaneOrder(sizes, num_lanes, window).order(epoch))


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 20), st.integers(1, 50), st.none() | st.integers(0, 2**40))
def test_lanes_are_runs_of_whole_shards_shuffled_within_windows(
    sizes: list[int], num_lanes: int, window: int, epoch: int | None
) -> None:
    # With one lane and windows of one sample nothing but the shards is shuffled.
    sequence = LaneOrder(sizes, 1, 1).order(epoch).tolist()
    shards = [shard_of(sizes)[index] for index in sequence]
    assert sum(before != after for before, after in pairwise(shards)) + 1 == len(set(shards)), "a shard is one run"
    owner = shard_of(sizes)
    assert all(after == before + 1 for before, after in pairwise(sequence) if owner[before] == owner[after])
    order, size = LaneOrder(sizes, num_lanes, window).order(epoch).tolist(), max(1, window // num_lanes)
    for lane, expected in enumerate(np.array_split(sequence, num_lanes)):
        found = order[lane::num_lanes]
        assert len(found) == len(expected)
        for start in range(0, len(found), size):
            block = expected[start : start + size].tolist()
            assert sorted(found[start : start + size]) == sorted(block)
            assert epoch is not None or found[start : start + size] == block


def test_order_without_an_epoch_is_file_order_in_every_lane() -> None:
    indices = LaneOrder([5, 6], 3, 100).order(None).tolist()
    assert indices == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7]


def test_epochs_differ_in_shards_and_in_samples() -> None:
    order = LaneOrder([50] * 20, 4, 100)
    first, second = (order.order(epoch).numpy() for epoch in (1, 2))
    assert (first // 50 != second // 50).mean() > 0.8
    assert np.diff(first[::4]).tolist().count(1) < 30, "neighbours in a file are not neighbours in a lane"
    # Only one window of 25 samples is met before the next.
    assert len(set((first[::4][:50] // 50).tolist())) == 1


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 20), st.integers(1, 50), st.none() | st.integers(0, 99), st.data())
def test_places_agree_with_the_order(
    sizes: list[int], num_lanes: int, window: int, epoch: int | None, data: st.DataObject
) -> None:
    order = LaneOrder(sizes, num_lanes, window)
    indices = order.order(epoch).tolist()
    chosen = data.draw(st.lists(st.integers(0, len(indices) - 1), min_size=1, max_size=20))
    places = order.places(epoch, [indices[ordinal] for ordinal in chosen])
    assert places.lane_K.tolist() == [ordinal % num_lanes for ordinal in chosen]
    size = max(1, window // num_lanes)
    windows = dict(zip(places.window_K.tolist(), chosen, strict=True))
    for window_id, ordinal in zip(places.window_K.tolist(), chosen, strict=True):
        other = windows[window_id]
        assert (other % num_lanes, other // num_lanes // size) == (ordinal % num_lanes, ordinal // num_lanes // size)
    expected = {(ordinal % num_lanes, ordinal // num_lanes // size) for ordinal in chosen}
    assert len(windows) == len(expected)
    shard, position = order.find(np.array(chosen))
    ends = np.cumsum(sizes)
    for sample, its_shard, its_position in zip(chosen, shard.tolist(), position.tolist(), strict=True):
        assert its_shard == shard_of(sizes)[sample]
        assert its_position == sample - (ends[its_shard] - sizes[its_shard])


def test_ranks_meet_only_their_own_shards() -> None:
    sizes = [40] * 16
    order = LaneOrder(sizes, 8, 80)
    met = []
    for rank in range(4):
        dealt = list(GlobalBatches(640, 16, rank, 4, seed=0, order=order.order).deal(3))
        indices = [index for each in dealt for index in each.indices]
        met.append({index // 40 for index in indices})
        assert set(order.places(epoch_key(0, 3), indices).lane_K.tolist()) == {rank, rank + 4}
    assert [len(shards) for shards in met] == [4, 4, 4, 4]
    assert set.union(*met) == set(range(16))


def test_workers_get_lanes_and_share_them_where_there_are_few() -> None:
    assert deal_lanes([0, 4, 8, 12, 0, 4, 8, 12], 2) == [0, 1, 0, 1, 0, 1, 0, 1]
    assert deal_lanes([3, 5, 3, 5, 3, 5, 5], 4) == [0, 1, 2, 3, 0, 1, 3]
    assert deal_lanes([7, 7, 7, 7], 3) == [0, 1, 2, 0]
    assert deal_lanes([], 3) == []


def test_workers_share_lanes_that_come_one_after_another() -> None:
    order = LaneOrder([50] * 4, 4, 40)
    for epoch in (None, 1):
        lanes = order.places(epoch, range(0, 200, 3)).lane_K.tolist()
        assert deal_lanes(lanes, 3) == [place % 3 for place in range(67)]
        lanes = order.places(epoch, order.order(epoch).tolist()).lane_K.tolist()
        assert deal_lanes(lanes, 2) == [place % 4 % 2 for place in range(200)]


def test_large_sets_take_seconds() -> None:
    order = LaneOrder([1000] * 1300, 16, 1000)
    assert order.order(1).shape == (1_300_000,)
    assert len(order.places(1, range(1_300_000)).lane_K) == 1_300_000
