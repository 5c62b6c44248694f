"""How ranks find those of their own attempt on a store that others have used before."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch.distributed as dist

from spt_dist import UserError
from spt_dist.exits import LOST, RunEnded
from spt_dist.parallel.beats import Kind, Verdict, first_beat
from spt_dist.parallel.store import Address, Board, agree, connect
from tests.launch.processes import _free_port as free_port
from tests.launch.processes import wait_until


def join(store: dist.Store, rank: int, world_size: int, timeout: float = 20.0, delay: float = 0.0) -> str | RunEnded:
    time.sleep(delay)
    try:
        return agree(store, replace(first_beat(rank), pid=rank), world_size, timeout)
    except RunEnded as error:
        return error


def attempt(store: dist.Store, delays: dict[int, float], world_size: int = 3, timeout: float = 20.0) -> list[object]:
    """What each of the ranks that come, after their delays, agrees on."""
    with ThreadPoolExecutor(len(delays)) as pool:
        return list(pool.map(lambda rank: join(store, rank, world_size, timeout, delays[rank]), delays))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_each_attempt_agrees_on_a_new_name_whoever_comes_late(late: int) -> None:
    store = dist.HashStore()
    seen = set()
    for _ in range(4):
        delays = {rank: 0.5 * (rank == late) for rank in range(3)}
        names = attempt(store, delays)
        assert len(set(names)) == 1 and isinstance(names[0], str) and names[0] not in seen
        seen.add(names[0])
        beats, verdict = Board(store, names[0]).read([0, 1, 2])
        assert [beats[rank].pid for rank in range(3)] == [0, 1, 2] and verdict is None


def test_an_attempt_that_broke_off_leaves_nothing_that_confuses_the_next() -> None:
    """A rank of the broken attempt still waits for it while all the others have been started again."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        left_over = pool.submit(join, store, 2, 3)
        wait_until(lambda: store.check(["hello/2"]))
        broken = attempt(store, {0: 0.0}, timeout=0.5)
        assert isinstance(broken[0], RunEnded)
        others = [pool.submit(join, store, rank, 3) for rank in (0, 1)]
        # It hears that its attempt is over, or is answered again before it looks. Only when it has ended may another
        # process have its rank.
        last = left_over.result()
        third = join(store, 2, 3) if isinstance(last, RunEnded) else last
        names = [*(other.result() for other in others), third]
        assert len(set(names)) == 1 and isinstance(names[0], str)


def test_a_rank_that_waits_follows_rank_zero_into_a_new_attempt() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(join, store, 1, 3)
        # The first rank 0 answers, and is gone before rank 2 comes.
        wait_until(lambda: store.check(["hello/1"]))
        store.set(f"answer/{store.get('hello/1').decode()}", "an attempt that never opens")
        time.sleep(0.5)
        names = attempt(store, {0: 0.0, 2: 0.2})
        assert names[0] == names[1] == waiting.result()


def test_who_is_missing_is_named_once() -> None:
    errors = attempt(dist.HashStore(), {0: 0.0, 2: 0.0}, world_size=5, timeout=4.0)
    assert all(isinstance(error, RunEnded) and error.status == LOST for error in errors)
    told = [str(error) for error in errors if isinstance(error, RunEnded) and error.tell]
    assert len(told) == 1
    assert told[0].startswith("3 ranks (1, 3, 4) have not come to join the others within 4 s; ")


def test_a_missing_rank_zero_is_named() -> None:
    started = time.monotonic()
    (error,) = attempt(dist.HashStore(), {1: 0.0}, world_size=2, timeout=0.5)
    assert str(error).startswith("rank 0 has not come to join the others within 0 s")
    assert time.monotonic() - started < 30


def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(RunEnded, match=rf"rank 0 has not come .* nobody listens at 127.0.0.1:{port}"):
            connect(Address("127.0.0.1", port, False), 1, 1.0)


# To a multicast address the kernel makes no connection; what becomes of any other is up to the network around.
@pytest.mark.parametrize("host", ["224.0.0.1", "no-such-host.invalid"])
def test_rank_zero_on_another_host_than_its_address(host: str) -> None:
    """As where MASTER_ADDR names a login node: the others would look there for as long as the timeout."""
    with pytest.raises(UserError, match=rf"rank 0 runs on .*, but MASTER_ADDR={host} does not lead there"):
        connect(Address(host, free_port(), False), 0, 5.0)


def test_a_name_that_can_not_be_looked_up() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-host\.invalid can't be looked up on"):
        connect(Address("no-such-host.invalid", free_port(), False), 1, 0.5)


@pytest.mark.parametrize("of_launcher", [False, True])
def test_somebody_else_listens_there(of_launcher: bool) -> None:
    """Another program that took the port: torch's client would wait for its answer without end."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = Address("127.0.0.1", other.getsockname()[1], of_launcher)
        started = time.monotonic()
        with pytest.raises(UserError, match=r"who listens at 127\.0\.0\.1:\d+ does not answer as rank 0 would"):
            connect(address, 1, 1.0)
        assert time.monotonic() - started < 20


def test_the_port_of_rank_zero_is_taken() -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is in use on .*, the host of rank 0; set MASTER_PORT"):
            connect(Address("127.0.0.1", port, False), 0, 5.0)


def test_rank_zero_listens_on_every_address_of_its_host() -> None:
    """127.0.0.2 stands for the one by which other hosts reach it."""
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(connect, Address("127.0.0.2", port, False), 1, 10.0)
        mine = connect(Address("127.0.0.1", port, False), 0, 10.0)
        mine.group.set("key", "value")
        assert other.result().watch.get("key") == b"value"
        assert mine.lifeline is None and other.result().lifeline is not None


def test_the_first_verdict_stands() -> None:
    board = Board(dist.HashStore(), "a")
    board.publish(first_beat(0))
    first, second = Verdict(Kind.FAILED, 1, "one"), Verdict(Kind.STOPPED, 2, "two")
    assert board.read([0])[1] is None
    assert board.settle(first) == first
    assert board.settle(second) == first
    assert board.read([0])[1] == first


def test_a_board_whose_store_is_gone_says_so() -> None:
    ours, theirs = socket.socketpair()
    board = Board(dist.HashStore(), "a", ours)
    board.check_connection()
    theirs.close()
    with pytest.raises(dist.DistNetworkError):
        board.check_connection()
    ours.close()
