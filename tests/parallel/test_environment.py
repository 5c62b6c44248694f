"""Rank, size and address under each launcher."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spt_dist import UserError
from spt_dist.parallel.environment import FIRST_PORT, NUM_PORTS, LaunchEnvironment, first_host, read_environment

Variables = dict[str, str]

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "1234",
}
# As SLURM 22.05 gives them to an sbatch script of two nodes with two tasks each, and to the last of srun's tasks in it.
SCRIPT = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "gpu[03-06]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
TASK = SCRIPT | {
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
# As Open MPI 4.1 gives them on the second of two hosts.
MPI = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_MCA_orte_hnp_uri": "435159040.0;tcp://10.77.0.11,192.168.0.1:34069",
    "PMIX_NAMESPACE": "435159041",
}


def without(variables: Variables, *names: str) -> Variables:
    return {name: value for name, value in variables.items() if name not in names}


def test_a_single_process() -> None:
    assert read_environment({}) == LaunchEnvironment(0, 1, 0, 1)
    assert read_environment({"RANK": "0", "WORLD_SIZE": "1"}) == LaunchEnvironment(0, 1, 0, 1)


def test_torchrun_and_deepspeed() -> None:
    assert read_environment(TORCHRUN) == LaunchEnvironment(3, 4, 1, 2, "node7", 1234)
    agent = TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert read_environment(agent) == LaunchEnvironment(3, 4, 1, 2, "node7", 1234, agent_store=True)
    deepspeed = without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_SIZE": "2"}
    assert read_environment(deepspeed) == LaunchEnvironment(3, 4, 1, 2, "node7", 1234)


def test_srun() -> None:
    found = read_environment(TASK)
    assert found == LaunchEnvironment(3, 4, 1, 2, "gpu03", found.port)
    assert FIRST_PORT <= found.port < FIRST_PORT + NUM_PORTS < 32768
    named = TASK | {"MASTER_ADDR": "ib-gpu03", "MASTER_PORT": "5"}
    assert read_environment(named) == LaunchEnvironment(3, 4, 1, 2, "ib-gpu03", 5)


def test_every_task_finds_the_same_port_and_each_step_another() -> None:
    other_task = TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert read_environment(other_task).port == read_environment(TASK).port
    steps = {read_environment(TASK | {"SLURM_STEP_ID": str(step)}).port for step in range(5)}
    assert len(steps) == 5
    assert read_environment(TASK | {"SLURM_JOB_ID": "78"}).port not in steps


def test_uneven_tasks_on_the_nodes_of_srun() -> None:
    """Here each node's own number counts: 3, 3 and 1 of 7."""
    step = TASK | {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1"}
    sizes = [read_environment(step | {"SLURM_NODEID": str(node)}).local_world_size for node in range(3)]
    assert sizes == [3, 3, 1]


def test_srun_on_one_node_needs_no_name() -> None:
    step = TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    assert read_environment(step | {"SLURM_PROCID": "1"}).address == "127.0.0.1"


def test_an_sbatch_script_is_no_task_of_its_job() -> None:
    """It has SLURM_PROCID=0 and SLURM_NTASKS=4; as rank 0 of four it would wait for three that never come."""
    found = read_environment(SCRIPT)
    assert (found.rank, found.world_size) == (0, 1)
    assert "this SLURM job has 4 tasks, but the script was not started with srun" in found.warning
    assert read_environment(SCRIPT | {"SLURM_NTASKS": "1"}).warning == ""
    # srun --pty bash, or a step of one task for something else within the job.
    step = TASK | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert read_environment(step) == LaunchEnvironment(0, 1, 1, 1, port=read_environment(step).port)


def test_launchers_within_a_step_of_slurm() -> None:
    """torchrun, deepspeed and mpirun start processes of their own on each node."""
    assert read_environment(TASK | TORCHRUN).rank == 3
    one_task_a_node = TASK | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert read_environment(one_task_a_node | TORCHRUN) == read_environment(TORCHRUN)
    daemon = TASK | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert read_environment(daemon | MPI) == read_environment(MPI)


def test_open_mpi() -> None:
    found = read_environment(MPI)
    assert found == LaunchEnvironment(3, 4, 1, 2, "10.77.0.11", found.port)
    assert FIRST_PORT <= found.port < FIRST_PORT + NUM_PORTS
    assert read_environment(MPI | {"PMIX_NAMESPACE": "435159042"}).port != found.port
    named = MPI | {"MASTER_ADDR": "a", "MASTER_PORT": "5"}
    assert read_environment(named) == LaunchEnvironment(3, 4, 1, 2, "a", 5)
    one_host = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert read_environment(one_host).address == "127.0.0.1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[03-06,9],cpu1", "gpu03"),
        ("login,gpu[1-2]", "login"),
        ("rack[2-3]gpu[007,9]-ib,x", "rack2gpu007-ib"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCHRUN | {"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is no number"),
        (TORCHRUN | {"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is no number"),
        (without(TORCHRUN, "WORLD_SIZE"), "RANK is set but WORLD_SIZE is not"),
        (without(TORCHRUN, "RANK"), "WORLD_SIZE is set but RANK is not"),
        (without(TORCHRUN, "LOCAL_RANK"), "RANK is set but LOCAL_RANK is not"),
        (without(TORCHRUN, "MASTER_ADDR"), "RANK is set but MASTER_ADDR is not"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "RANK is set but MASTER_ADDR is not"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is set but RANK is not"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 has to lie between 1 and 65535"),
        (TASK | {"MASTER_PORT": "0"}, "MASTER_PORT=0 has to lie between 1 and 65535"),
        (without(TASK, "SLURM_PROCID"), "SLURM_STEP_ID is set but SLURM_PROCID is not"),
        (without(MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_RANK is set but OMPI_COMM_WORLD_SIZE is not"),
        (without(MPI, "OMPI_MCA_orte_hnp_uri"), "add -x MASTER_ADDR=FIRST_HOST"),
        (
            TASK | {"RANK": "0", "WORLD_SIZE": "1"},
            "RANK=0 and WORLD_SIZE=1 are set, but srun says SLURM_PROCID=3 and SLURM_STEP_NUM_TASKS=4; unset",
        ),
        (
            TASK | MPI | {"RANK": "0", "WORLD_SIZE": "1"},
            "but mpirun says OMPI_COMM_WORLD_RANK=3 and OMPI_COMM_WORLD_SIZE=4",
        ),
    ],
)
def test_broken_environments_are_explained_in_one_line(variables: Variables, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_environment(variables)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_processes_started_by_hand_in_a_single_task() -> None:
    """As from `srun --pty bash`."""
    task = TASK | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert read_environment(task | without(TORCHRUN, "LOCAL_WORLD_SIZE")).world_size == 4


def test_another_mpi_s_processes_are_told_that_they_run_alone() -> None:
    found = read_environment({"PMI_RANK": "1", "PMI_SIZE": "4"})
    assert found.world_size == 1 and "PMI_SIZE=4" in found.warning


def test_a_job_that_starts_again_takes_another_port() -> None:
    """What took the port then may still have it."""
    assert read_environment(TASK | {"SLURM_RESTART_COUNT": "1"}).port != read_environment(TASK).port


def test_ranks_set_by_hand_from_those_of_srun_are_taken() -> None:
    by_hand = without(TORCHRUN, "LOCAL_WORLD_SIZE")
    assert read_environment(TASK | by_hand) == LaunchEnvironment(3, 4, 1, 1, "node7", 1234)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(sorted(TORCHRUN | TASK | MPI)),
        st.one_of(st.sampled_from(["", "0", "1", "4", "-1", "n[1-", "2(x2)", "²"]), st.text(max_size=5)),
    )
)
def test_whatever_is_in_the_environment_ranks_are_sound_or_it_is_refused(variables: Variables) -> None:
    try:
        found = read_environment(variables)
    except UserError:
        return
    assert 0 <= found.rank < found.world_size
    assert found.local_rank >= 0 and found.local_world_size >= 0
