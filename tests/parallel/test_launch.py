"""Rank, size and address under each launcher."""

import pytest

from spt_dist import UserError
from spt_dist.parallel.launch import LaunchEnvironment, read_environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "1234",
}


def test_a_single_process() -> None:
    assert read_environment({}) == LaunchEnvironment(0, 1, 0, 1)
    assert read_environment({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) == LaunchEnvironment(0, 1, 0, 1)


def test_torchrun_and_deepspeed() -> None:
    assert read_environment(TORCHRUN) == LaunchEnvironment(3, 4, 1, 2, "node7", 1234)
    agent = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert read_environment(agent) == LaunchEnvironment(3, 4, 1, 2, "node7", 1234, agent_store=True)
    deepspeed = {**TORCHRUN, "LOCAL_SIZE": "2"}
    del deepspeed["LOCAL_WORLD_SIZE"]
    assert read_environment(deepspeed) == LaunchEnvironment(3, 4, 1, 2, "node7", 1234)


def test_srun() -> None:
    slurm = {
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "gpu[03-06,9],cpu1",
    }
    assert read_environment(slurm) == LaunchEnvironment(1, 2, 0, 1, "gpu03", 20077)


def test_open_mpi() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert read_environment(mpi | {"MASTER_ADDR": "a", "MASTER_PORT": "5"}) == LaunchEnvironment(1, 2, 1, 1, "a", 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"RANK": "one"}, "RANK='one' is no number"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is no number"),
        ({"WORLD_SIZE": None}, "RANK is set but WORLD_SIZE is not"),
    ],
)
def test_broken_environments_are_explained(change: dict[str, str | None], message: str) -> None:
    variables = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        read_environment(variables)
