"""The store on which ranks find each other, and how they agree that they all belong to the same attempt."""

import contextlib
import select
import socket
import time
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

from spt_dist.background import in_background
from spt_dist.errors import UserError
from spt_dist.exits import LOST, RunEnded
from spt_dist.parallel.beats import Beat, Verdict
from spt_dist.parallel.environment import LOOPBACK

PAUSE = 0.1
# Rank 0 sees best who is missing, and is given this time to say it before another rank does.
SECONDS_FOR_RANK_ZERO = 5.0
# For the others to hear that ranks are missing, before the store ends with rank 0.
SECONDS_TO_HEAR = 5.0
# For rank 0 to find that its address leads to its own host, and for anybody to find that a name can't be looked up.
SECONDS_TO_REACH_ITSELF = 10.0
SECONDS_TO_LOOK_UP = 60.0
# For who listens to answer.
SECONDS_TO_ANSWER = 30.0
MOST_NAMED = 8


@dataclass(frozen=True)
class Address:
    """Where the store is.

    Attributes:
        host, port: where it listens.
        of_launcher: whether the launcher's process holds it; if not, rank 0 does.
    """

    host: str
    port: int
    of_launcher: bool

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Board:
    """The part of the store on which the ranks of one attempt leave signs of life and agree on what went wrong.

    Args:
        store: a client of its own: one that waits for a key keeps everybody else who uses it waiting.
        attempt: what ``agree`` gave.
        lifeline: a connection to the store's process that nothing is sent over; ``None`` where that is this process.
    """

    def __init__(self, store: dist.Store, attempt: str, lifeline: socket.socket | None = None) -> None:
        self.store = dist.PrefixStore(attempt, store)
        self.lifeline = lifeline

    def check_connection(self) -> None:
        """Ask whether the store is still there; its own client prints a page where it is not.

        Raises:
            dist.DistNetworkError: it is gone.
        """
        if self.lifeline is None or not select.select([self.lifeline], [], [], 0)[0]:
            return
        with contextlib.suppress(OSError):
            if self.lifeline.recv(1):
                return
        raise dist.DistNetworkError("the store's process closed the connection")

    def publish(self, beat: Beat) -> None:
        """Leave a rank's latest beat."""
        self.store.set(_beat_key(beat.rank), beat.to_json())

    def read(self, ranks: list[int]) -> tuple[dict[int, Beat], Verdict | None]:
        """The latest beat of each of some ranks, and the verdict if there is one."""
        # Where there is no verdict this leaves an empty one, so that nobody waits for the key.
        verdict = self.store.compare_set("verdict", "", "")
        beats = [Beat.from_json(text) for text in self.store.multi_get([_beat_key(rank) for rank in ranks])]
        return {beat.rank: beat for beat in beats}, Verdict.from_json(verdict) if verdict else None

    def settle(self, verdict: Verdict) -> Verdict:
        """Propose a verdict; returns the one that stands, which is the first."""
        return Verdict.from_json(self.store.compare_set("verdict", "", verdict.to_json()))


@dataclass(frozen=True)
class Connections:
    """Ways to the store.

    Attributes:
        group, watch: clients of their own for the process group and for the board.
        lifeline: see ``Board``.
    """

    group: dist.Store
    watch: dist.Store
    lifeline: socket.socket | None = None


def alone() -> Connections:
    """The store of a run of one process."""
    store = dist.HashStore()
    return Connections(store, store)


def connect(address: Address, rank: int, timeout: float) -> Connections:
    """Reach the store; rank 0 opens it unless the launcher has.

    Raises:
        UserError: the port is taken, the address is another host's than rank 0's, or it can't be looked up.
        RunEnded: nobody listens within ``timeout`` seconds.
    """
    if rank or address.of_launcher:
        lifeline = _wait_for_listener(address, timeout)
        return Connections(_client(address, timeout), _client(address, timeout), lifeline)
    # Rank 0 listens on all its addresses, and needs none of them for itself.
    own = replace(address, host=LOOPBACK)
    try:
        store = dist.TCPStore(
            own.host,
            own.port,
            is_master=True,
            timeout=timedelta(seconds=timeout),
            multi_tenant=True,
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"environment: port {own.port} is in use on {socket.gethostname()}, the host of rank 0; set MASTER_PORT "
            "to another"
        ) from error
    _check_own(address)
    return Connections(store, _client(own, timeout))


def _client(address: Address, timeout: float) -> dist.Store:
    """A client of the store. Torch's own waits without end for one who listens, but is no store."""
    wait = timedelta(seconds=timeout)
    client = in_background(
        lambda: dist.TCPStore(address.host, address.port, is_master=False, timeout=wait, wait_for_workers=False)
    )
    try:
        return client.result(min(timeout, SECONDS_TO_ANSWER))
    except FutureTimeout:
        raise UserError(
            f"environment: who listens at {address} does not answer as rank 0 would; set MASTER_PORT to another"
        ) from None


def _check_own(address: Address) -> None:
    """Look whether rank 0's own store is where the other ranks will look for it."""
    try:
        socket.create_connection((address.host, address.port), timeout=SECONDS_TO_REACH_ITSELF).close()
    except OSError as error:
        raise UserError(
            f"environment: rank 0 runs on {socket.gethostname()}, but MASTER_ADDR={address.host} does not lead there "
            f"({error}); set it to a name or an address of the host of rank 0"
        ) from error


def agree(store: dist.Store, beat: Beat, world_size: int, timeout: float) -> str:
    """Find the other ranks of this attempt; returns a name that all of them, and nobody before them, have.

    ``torchrun --max-restarts`` starts ranks again on a store that still holds what those before them wrote. So
    each rank says hello under a name that nobody had before; rank 0 answers to every hello that it finds, those of the
    dead included, with the name of the attempt, which is new too; who is answered gets ready, which the dead can't;
    and when all are ready, rank 0 opens the attempt. A rank goes on once the attempt that it was answered with last is
    open. So every rank of an open attempt was alive at that time, and answered to by this very rank 0. Nothing is
    asked of the launcher but that no two processes with the same rank live at the same time.

    Args:
        beat: the introduction of this rank; those of all ranks are on the attempt's board afterwards.
        world_size: how many ranks there have to be.
        timeout: seconds within which they have to come.

    Raises:
        RunEnded: not all ranks came in time; the message names those that didn't.
    """
    name = uuid4().hex
    if beat.rank == 0:
        _invite(store, name, beat, world_size, timeout)
        return name
    store.set(f"hello/{beat.rank}", name)
    attempt = ""
    deadline = time.monotonic() + timeout + SECONDS_FOR_RANK_ZERO
    while not (attempt and store.check([f"open/{attempt}"])):
        if attempt and store.check([f"missing/{attempt}"]):
            store.set(f"heard/{attempt}/{beat.rank}", "")
            raise RunEnded("not all ranks came", LOST, tell=False)
        if time.monotonic() > deadline:
            raise _missing([0], timeout)
        time.sleep(PAUSE)
        if store.check([f"answer/{name}"]):
            answer = store.get(f"answer/{name}").decode()
            if answer != attempt:
                attempt = answer
                Board(store, attempt).publish(beat)
    return attempt


def _invite(store: dist.Store, attempt: str, beat: Beat, world_size: int, timeout: float) -> None:
    """Rank 0's side of ``agree``."""
    Board(store, attempt).publish(beat)
    answered: dict[int, bytes] = {}
    deadline = time.monotonic() + timeout
    while missing := _not_ready(store, attempt, world_size):
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                name = store.get(f"hello/{rank}")
                if answered.get(rank) != name:
                    store.set(f"answer/{name.decode()}", attempt)
                    answered[rank] = name
        if time.monotonic() > deadline:
            store.set(f"missing/{attempt}", "")
            heard = [f"heard/{attempt}/{rank}" for rank in range(1, world_size) if rank not in missing]
            limit = time.monotonic() + SECONDS_TO_HEAR
            while heard and not store.check(heard) and time.monotonic() < limit:
                time.sleep(PAUSE)
            raise _missing(missing, timeout)
        time.sleep(PAUSE)
    store.set(f"open/{attempt}", "")


def _not_ready(store: dist.Store, attempt: str, world_size: int) -> list[int]:
    inside = dist.PrefixStore(attempt, store)
    return [rank for rank in range(1, world_size) if not inside.check([_beat_key(rank)])]


def _missing(ranks: list[int], timeout: float) -> RunEnded:
    names = ", ".join(map(str, ranks[:MOST_NAMED])) + (", ..." if len(ranks) > MOST_NAMED else "")
    whose = f"rank {names} has" if len(ranks) == 1 else f"{len(ranks)} ranks ({names}) have"
    return RunEnded(
        f"{whose} not come to join the others within {timeout:.0f} s; look at what they print, or raise engine.timeout",
        LOST,
    )


def _wait_for_listener(address: Address, timeout: float) -> socket.socket:
    """A connection to who listens, once somebody does; torch's own client prints pages while it waits."""
    started = time.monotonic()
    deadline = started + timeout
    while True:
        try:
            left = max(PAUSE, deadline - time.monotonic())
            return socket.create_connection((address.host, address.port), timeout=left)
        except socket.gaierror as error:
            # A name server may not know of a host that has just been started.
            if time.monotonic() > min(deadline, started + SECONDS_TO_LOOK_UP):
                raise UserError(
                    f"environment: MASTER_ADDR={address.host} can't be looked up on {socket.gethostname()} ({error}); "
                    "set it to a name or an address that all hosts know"
                ) from error
        except OSError as error:
            if time.monotonic() > deadline:
                holder = "the launcher" if address.of_launcher else "rank 0"
                raise RunEnded(
                    f"{holder} has not come to join the others within {timeout:.0f} s: nobody listens at {address} "
                    f"({error}); look at what it prints, and at MASTER_ADDR and MASTER_PORT",
                    LOST,
                ) from error
        time.sleep(PAUSE)


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"
