"""Joining the process group under any launcher."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from spt_dist.parallel.beats import first_beat
from spt_dist.parallel.environment import LaunchEnvironment, read_environment
from spt_dist.parallel.faults import is_mistake
from spt_dist.parallel.introductions import Introduction, choose_backend, exchange, interface_between_hosts
from spt_dist.parallel.signals import Stopped, StopSignals
from spt_dist.parallel.store import Address, Board, agree, alone, connect
from spt_dist.parallel.watch import Watch

SECONDS_FOR_WATCH = 10.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProcessGroup(LaunchEnvironment):
    """A rank within the process group.

    Attributes:
        watch: to be told where the rank is.
        stop: whether the run was asked to stop.
    """

    watch: Watch
    stop: StopSignals


@contextmanager
def process_group(timeout: float = 600.0) -> Iterator[ProcessGroup]:
    """Join the process group for the length of the block; every rank on its device, watched, and ready to be stopped.

    The group exists for a single process too: DeepSpeed wants one. It is NCCL where every rank has a GPU of its
    own, gloo elsewhere. Threads are shared out among the ranks of a node where the launcher left that open.

    A group of several ranks that an exception ends is left as it is: taking it apart may wait for ranks that are gone.
    End the process by ``os._exit``, as the scripts of ``launch/`` do.

    Args:
        timeout: seconds within which all ranks have to come, and after which a run that makes no progress is ended;
            see ``Watch.report``.

    Raises:
        RunEnded: instead of any exception in the block that the user can't mend, and where another rank ends the run.
        Stopped: all ranks stopped after they saved a checkpoint.
    """
    environment = read_environment()
    # DeepSpeed reads these itself, and not every launcher sets them.
    os.environ.update(
        RANK=str(environment.rank),
        WORLD_SIZE=str(environment.world_size),
        LOCAL_RANK=str(environment.local_rank),
        MASTER_ADDR=environment.address,
        MASTER_PORT=str(environment.port),
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.local_world_size))
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank % torch.cuda.device_count())
    if environment.warning:
        logger.warning("%s", environment.warning)
    rank, world_size = environment.rank, environment.world_size
    address = Address(environment.address, environment.port, environment.agent_store)
    store = alone() if world_size == 1 else connect(address, rank, timeout)
    beat = first_beat(rank)
    attempt = agree(store.group, beat, world_size, timeout)
    board = Board(store.watch, attempt, store.lifeline)
    with StopSignals() as stop, Watch(board, beat, world_size, timeout, address, environment.local_rank == 0) as watch:
        try:
            watch.report(0, "joining the other ranks")
            dist.init_process_group(
                _choose_way(dist.PrefixStore(attempt, store.group), store.lifeline, rank, world_size),
                store=dist.PrefixStore(f"{attempt}/group", store.group),
                rank=rank,
                world_size=world_size,
                # The watch knows more than a collective does, and speaks first.
                timeout=timedelta(seconds=timeout + max(SECONDS_FOR_WATCH, timeout / 10)),
            )
            watch.report(0, "starting", limited=False)
            yield ProcessGroup(**asdict(environment), watch=watch, stop=stop)
        except BaseException as error:
            if is_mistake(error):
                stop.restore()  # the first rank says it, and its end ends the others
            else:
                stop.ignore()
            if world_size == 1 or (isinstance(error, Stopped) and error.step is not None):
                _destroy()
            raise
        _destroy()


def _choose_way(store: dist.Store, connection: socket.socket | None, rank: int, world_size: int) -> str:
    """How the ranks talk to each other: the name of the backend, and for gloo the network interface."""
    mine = Introduction.of(_device_id(), connection)
    everybody = exchange(store, rank, world_size, mine)
    backend = choose_backend(everybody)
    interface = interface_between_hosts(mine, everybody)
    if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    if world_size > 1:
        hosts = len({one.host for one in everybody})
        over = f", over {interface}" if interface and backend == "gloo" else ""
        logger.info("%d ranks on %d hosts, joined by %s%s", world_size, hosts, backend, over)
    return backend


def _device_id() -> str:
    """What tells this rank's GPU from all others in the world; "" for a CPU."""
    return str(torch.cuda.get_device_properties(local_device()).uuid) if torch.cuda.is_available() else ""


def _destroy() -> None:
    # Leaving without this aborts now and then inside gloo's threads.
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """The device of this rank: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
