"""Finding rank, world size and address in what a launcher leaves in the environment."""

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spt_dist.errors import UserError

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPI_NAMES = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
_STEP_NAMES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_LOCAL_SIZE_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
# Below the range from which Linux gives ports to outgoing connections.
FIRST_PORT, NUM_PORTS = 12_000, 20_000
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class LaunchEnvironment:
    """What a launcher tells one of its processes.

    Attributes:
        rank, world_size, local_rank: as in ``torch.distributed``.
        local_world_size: processes on this node, as far as the launcher tells.
        address, port: where the ranks find each other.
        agent_store: whether the launcher's process listens there, as torchrun's does; if not, rank 0 does.
        warning: what the user should know about the way the process was started; "" for nothing.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = LOOPBACK
    port: int = 29500
    agent_store: bool = False
    warning: str = ""


def read_environment(variables: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Read the launcher's variables; a single process where there are none.

    RANK and its fellows come from torchrun, deepspeed, or a script that sets them by hand; Open MPI's go before
    SLURM's, for mpirun starts its own daemons as tasks of SLURM.

    Raises:
        UserError: a variable is missing beside its fellows, no number, or out of range; RANK and WORLD_SIZE were left
            in the environment and are not what srun or mpirun say; or Open MPI does not tell where rank 0 is.
    """
    variables = os.environ if variables is None else variables
    launched = _read_mpi(variables) or _read_step(variables)
    named = [name for name in RANK_NAMES[:2] if name in variables]
    if named:
        found = _read_ranks(variables, named[0])
        if launched is not None:
            _check_same(found, launched, variables)
        return found
    if launched is not None:
        return launched
    if "LOCAL_RANK" in variables:
        _require(variables, RANK_NAMES, "LOCAL_RANK")
    return LaunchEnvironment(warning=_why_alone(variables))


def first_host(nodes: str) -> str:
    """The first of a SLURM node list: ``gpu[03-06,9]-ib,cpu1`` -> ``gpu03-ib``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _why_alone(variables: Mapping[str, str]) -> str:
    """What speaks for it that a process without ranks should have some; "" for nothing."""
    tasks, others = variables.get("SLURM_NTASKS", "1"), variables.get("PMI_SIZE", "1")
    if tasks != "1":
        return f"this SLURM job has {tasks} tasks, but the script was not started with srun: it runs alone"
    if others != "1":
        return f"PMI_SIZE={others}, but of MPI's launchers only Open MPI's is known here: each process runs alone"
    return ""


def _read_ranks(variables: Mapping[str, str], present: str) -> LaunchEnvironment:
    """RANK and its fellows; ``present`` is one that is set."""
    # A process on its own needs no address.
    _require(variables, RANK_NAMES[:2] if variables.get("WORLD_SIZE") == "1" else RANK_NAMES, present)
    local_size = next((_number(variables, name, 1) for name in _LOCAL_SIZE_NAMES if name in variables), 1)
    return LaunchEnvironment(
        *_read_numbers(variables, ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
        local_size,
        variables.get("MASTER_ADDR") or LOOPBACK,
        _port(variables, 29500),
        variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _read_mpi(variables: Mapping[str, str]) -> LaunchEnvironment | None:
    """A process of Open MPI's ``mpirun``."""
    if "OMPI_COMM_WORLD_RANK" not in variables:
        return None
    _require(variables, _MPI_NAMES, _MPI_NAMES[0])
    rank, world_size, local_rank = _read_numbers(variables, _MPI_NAMES)
    local_size = _number(variables, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    address = variables.get("MASTER_ADDR") or (LOOPBACK if local_size == world_size else "")
    if not address:
        # Where mpirun runs: the host of rank 0 if it was started on the first of its hosts.
        uri = re.search(r"tcp://([^:,]+)", variables.get("OMPI_MCA_orte_hnp_uri", ""))
        if uri is None:
            raise UserError("environment: mpirun does not tell where rank 0 is; add -x MASTER_ADDR=FIRST_HOST to it")
        address = uri[1]
    port = _port(variables, _own_port(variables.get("PMIX_NAMESPACE", "")))
    return LaunchEnvironment(rank, world_size, local_rank, local_size, address, port)


def _read_step(variables: Mapping[str, str]) -> LaunchEnvironment | None:
    """A task of ``srun``. An sbatch script has SLURM_PROCID and SLURM_NTASKS too, but is in no step."""
    if "SLURM_STEP_ID" not in variables:
        return None
    _require(variables, _STEP_NAMES, "SLURM_STEP_ID")
    rank, world_size, local_rank = _read_numbers(variables, _STEP_NAMES)
    tasks = _tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(variables, "SLURM_NODEID", 0)
    local_size = tasks[node] if node < len(tasks) else 1
    nodes = variables.get("SLURM_STEP_NODELIST", "")
    address = variables.get("MASTER_ADDR") or (LOOPBACK if local_size == world_size else first_host(nodes) or LOOPBACK)
    # Another at each start of the job: what took the port then may still have it.
    job = [variables.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    return LaunchEnvironment(
        rank, world_size, local_rank, local_size, address, _port(variables, _own_port(".".join(job)))
    )


def _check_same(found: LaunchEnvironment, launched: LaunchEnvironment, variables: Mapping[str, str]) -> None:
    """Refuse what was exported before ``srun`` or ``mpirun``: each of their processes would take itself for that rank.

    torchrun and deepspeed, which may run as their tasks, say how many processes they started on the node.
    """
    # Nor can a single task be several ranks: whoever starts processes by hand in it says so himself.
    if any(name in variables for name in _LOCAL_SIZE_NAMES) or launched.world_size == 1 < found.world_size:
        return
    if (found.rank, found.world_size) != (launched.rank, launched.world_size):
        launcher, names = ("mpirun", _MPI_NAMES) if _MPI_NAMES[0] in variables else ("srun", _STEP_NAMES)
        raise UserError(
            f"environment: RANK={found.rank} and WORLD_SIZE={found.world_size} are set, but {launcher} says "
            f"{names[0]}={launched.rank} and {names[1]}={launched.world_size}; unset RANK and WORLD_SIZE"
        )


def _require(variables: Mapping[str, str], names: Sequence[str], present: str) -> None:
    for name in names:
        if not variables.get(name):
            raise UserError(
                f"environment: {present} is set but {name} is not; start through a launcher, set all of "
                f"{', '.join(names)}, or unset {present}"
            )


def _read_numbers(variables: Mapping[str, str], names: tuple[str, str, str]) -> tuple[int, int, int]:
    """Rank, world size and rank within the node."""
    rank, world_size, local_rank = (_number(variables, name, 0) for name in names)
    if not rank < world_size:
        raise UserError(f"environment: {names[0]}={rank} is not below {names[1]}={world_size}")
    return rank, world_size, local_rank


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"environment: {name}={text!r} is no number; start through a launcher or unset it")
    return int(text)


def _port(variables: Mapping[str, str], default: int) -> int:
    port = _number(variables, "MASTER_PORT", default)
    if not 0 < port < 65_536:
        raise UserError(f"environment: MASTER_PORT={port} has to lie between 1 and 65535")
    return port


def _tasks_per_node(text: str) -> list[int]:
    """``2(x2),1`` -> ``[2, 2, 1]``."""
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _own_port(of_what: str) -> int:
    """A port for those who agree on a name and on nothing else."""
    return FIRST_PORT + zlib.crc32(of_what.encode()) % NUM_PORTS
