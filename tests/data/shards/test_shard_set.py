"""Streaming samples out of shards."""

import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_dist.data.shards import lane as lane_module
from tests.data.shards.shards_for_tests import open_set, read, write_shards

SIZES = [7, 1, 30, 12, 0, 25, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES)


@settings(max_examples=60, deadline=None)
@given(st.none() | st.integers(0, 99), st.integers(1, 20), st.integers(1, 60), st.data())
def test_what_is_asked_for_arrives_in_order(
    folder: Path, epoch: int | None, lanes: int, window: int, data: st.DataObject
) -> None:
    samples = open_set(folder, lanes=lanes, window=window)
    order = samples.order(epoch).tolist()
    first = data.draw(st.integers(0, len(order)))
    some = sorted(data.draw(st.sets(st.sampled_from(order))))
    anything = data.draw(st.lists(st.sampled_from(order), max_size=30))
    for wanted in (order, order[first:], order[first::3], some, [*order[first:], *order[:1]], anything):
        assert read(samples, epoch, wanted) == wanted


def test_items_are_prepared_with_epoch_and_index(folder: Path) -> None:
    samples = open_set(folder)
    items = list(samples.stream(5, [3, 40]))
    assert [item[0].tolist() for item in items] == [[3, 3, 5], [40, 40, 5]]
    assert [item[1] for item in items] == [3, 40 % 7]


def test_the_union_over_parts_is_the_whole(folder: Path) -> None:
    samples = open_set(folder, lanes=8, window=16)
    order = samples.order(9).tolist()
    for num_parts in (1, 2, 3, 12):
        owners = samples.parts(9, order, num_parts)
        arrived = [None] * len(order)
        for part in range(num_parts):
            places = [place for place, owner in enumerate(owners) if owner == part]
            for place, number in zip(places, read(samples, 9, [order[place] for place in places]), strict=True):
                arrived[place] = number
        assert arrived == order


def test_it_can_be_sent_to_a_process_that_knows_nothing(folder: Path) -> None:
    samples = open_set(folder)
    assert read(pickle.loads(pickle.dumps(samples)), 2, [5, 50]) == [5, 50]


class Watch:
    """Counts open shards and waiting samples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.open_now = self.most_open = self.most_waiting = 0
        self.readers: list[lane_module.LaneReader] = []
        plain_open, plain_take = lane_module.open_stream, lane_module.LaneReader.take

        def watched_open(location: str, name: str) -> lane_module.Stream:
            stream = plain_open(location, name)
            plain_close = stream.close
            self.opened.append(name)
            self.open_now += 1
            self.most_open = max(self.most_open, self.open_now)

            def close() -> None:
                self.open_now -= 1
                plain_close()

            monkeypatch.setattr(stream, "close", close)
            return stream

        def watched_take(reader: lane_module.LaneReader) -> lane_module.Outcome:
            if reader not in self.readers:
                self.readers.append(reader)
            outcome = plain_take(reader)
            self.most_waiting = max(self.most_waiting, sum(each.num_waiting for each in self.readers))
            return outcome

        monkeypatch.setattr(lane_module, "open_stream", watched_open)
        monkeypatch.setattr(lane_module.LaneReader, "take", watched_take)


def test_memory_and_open_files_are_bounded_and_shards_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = open_set(write_shards(tmp_path, [60] * 20), lanes=4, window=80)
    watch = Watch(monkeypatch)
    for epoch in (0, 1):
        order = samples.order(epoch).tolist()
        assert read(samples, epoch, order) == order
    assert 40 < watch.most_waiting <= 80
    assert watch.most_open <= 4 and watch.open_now == 0
    # Each once, and one more for each lane that begins in the middle of one; here lanes begin with shards.
    assert len(watch.opened) == 40


def test_small_shards_are_opened_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_set(write_shards(tmp_path, [3] * 50), lanes=2, window=80)
    watch = Watch(monkeypatch)
    order = samples.order(0).tolist()
    assert read(samples, 0, order) == order
    assert watch.most_open <= 2 and len(watch.opened) == 50


def test_ascending_requests_hold_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_set(write_shards(tmp_path, [60] * 20), lanes=4, window=80)
    watch = Watch(monkeypatch)
    wanted = sorted(random.Random(0).sample(range(1200), 300))
    assert read(samples, 3, wanted) == wanted
    assert watch.most_waiting == 0 and watch.most_open <= 2
    assert len(watch.opened) <= 20


def test_a_stream_that_is_left_closes_what_it_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_set(folder, lanes=3, window=3)
    watch = Watch(monkeypatch)
    stream = samples.stream(0, samples.order(0).tolist())
    next(stream), next(stream)
    assert watch.open_now == 2
    stream.close()
    assert watch.open_now == 0
