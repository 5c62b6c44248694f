"""Finding rank, world size and address under any launcher, and joining the process group."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from spt_dist.errors import UserError
from spt_dist.parallel.beats import first_beat
from spt_dist.parallel.faults import is_mistake
from spt_dist.parallel.signals import Stopped, StopSignals
from spt_dist.parallel.store import Address, Board, agree, alone, connect
from spt_dist.parallel.watch import Watch

# Launcher -> where it keeps (rank, world size, rank within the node).
_LAUNCHER_VARIABLES = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
SECONDS_FOR_WATCH = 10.0
_LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")


@dataclass(frozen=True)
class LaunchEnvironment:
    """What a launcher tells one of its processes.

    Attributes:
        rank, world_size, local_rank: as in ``torch.distributed``.
        local_world_size: processes on this node, as far as the launcher tells.
        address, port: where the ranks find each other.
        agent_store: whether the launcher's process listens there, as torchrun's does; if not, rank 0 does.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    agent_store: bool = False


def read_environment(variables: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Read the launcher's variables; a single process where there are none.

    Raises:
        UserError: a variable is missing beside its fellows, no number, or out of range.
    """
    variables = os.environ if variables is None else variables
    for launcher, names in _LAUNCHER_VARIABLES.items():
        present = [name for name in names[:2] if name in variables]
        # An sbatch script's own environment has SLURM_NTASKS without SLURM_PROCID: no task of srun, one process.
        if len(present) == 2:
            return _read(names, variables)
        if launcher.startswith("torchrun") and present:
            missing = next(name for name in names if name not in variables)
            raise UserError(
                f"environment: {present[0]} is set but {missing} is not; start through a launcher or unset it"
            )
    return LaunchEnvironment()


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
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(environment.local_rank % torch.cuda.device_count())
    backend = "nccl" if on_gpu and environment.local_world_size <= torch.cuda.device_count() else "gloo"
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
                backend,
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


def _destroy() -> None:
    # Leaving without this aborts now and then inside gloo's threads.
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """The device of this rank: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _read(names: tuple[str, str, str], variables: Mapping[str, str]) -> LaunchEnvironment:
    rank, world_size, local_rank = (_number(variables, name, 0) for name in names)
    if not rank < world_size:
        raise UserError(f"environment: {names[0]}={rank} is not below {names[1]}={world_size}")
    local_size = next((_number(variables, name, 1) for name in _LOCAL_SIZE_VARIABLES if name in variables), 1)
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    address = variables.get("MASTER_ADDR") or (_first_host(nodes) if nodes else "127.0.0.1")
    port = _number(variables, "MASTER_PORT", 20000 + _number(variables, "SLURM_JOB_ID", 9500) % 20000)
    agent_store = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return LaunchEnvironment(rank, world_size, local_rank, local_size, address, port, agent_store)


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"environment: {name}={text!r} is no number; start through a launcher or unset it")
    return int(text)


def _first_host(nodes: str) -> str:
    """``gpu[03-06,9],cpu1`` -> ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    assert match is not None
    return match[1] + (match[2] or "")
