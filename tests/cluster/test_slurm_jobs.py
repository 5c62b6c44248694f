"""The job scripts of launch/slurm on a real SLURM: what goes back into the queue, and what does not."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.cluster import RunningCommand, Slurm
from tests.launch.processes import ROOT, wait_until
from tests.launch.runs import write_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPTS = ROOT / "launch" / "slurm"
# Of the partitions "low" and "lowc", see slurm_up.sh: more than a busy machine needs to end a job and to start one.
GRACE_SECONDS = 90
ON_BOTH = ("--nodes=2", "--ntasks-per-node=1")
# SLURM refuses a job that is released in the second in which it was put back.
SECONDS_BEFORE_RELEASE = 3.0
# What `python` is in these jobs: a rank that does, at the job's start number N, what WORK_DIR/order-N says; until then
# it runs, and saves a checkpoint when it is asked to stop. SLURM signals all processes of a step: a command that reads
# or saves would be killed by what the rank outlives, so bash does it by itself.
STAND_IN = """#!/usr/bin/env bash
[[ $3 == --member ]] && name=/$4 || name=
while [ "$1" != --work-dir ]; do shift; done
work_dir=$2$name start=${SLURM_RESTART_COUNT:-0} stop=
mkdir -p "$work_dir/checkpoints"
trap 'stop=1' TERM USR1
save() { echo "$start" >"$work_dir/checkpoints/latest"; }
: >"$work_dir/running-$start-$SLURM_PROCID"
while :; do
    order=
    [ ! -e "$work_dir/order-$start" ] || read -r order <"$work_dir/order-$start"
    case $order in
        "end "*) echo "error: ends with ${order#end }"; exit "${order#end }" ;;
        "save, end "*) save; exit "${order#save, end }" ;;
        "save, die") save; kill -KILL $$ ;;
    esac
    if [ -n "$stop" ]; then
        [ "$order" != "stop slowly" ] || sleep 12
        [ "$order" = "stop without saving" ] || save
        echo "stopped; PATH $PATH"
        exit 75
    fi
    sleep 0.1
done
"""


class Job:
    """A job of the scripts that ship whose ranks are stand-ins.

    Args:
        slurm: to be submitted to.
        folder: has blanks in its name, and gets the work dir.
        options: of sbatch.
        ranks: number of them.
        script: of ``launch/slurm/``.
        variables: for the job script.
    """

    def __init__(
        self,
        slurm: Slurm,
        folder: Path,
        options: Sequence[str] = (),
        ranks: int = 2,
        script: str = "train.sbatch",
        **variables: str,
    ) -> None:
        self.slurm, self.ranks = slurm, ranks
        self.work_dir = folder / "the work"
        self.work_dir.mkdir()
        exported = {"SPT_SITE": str(write_site(folder)), "SPT_FOLDER": str(self.work_dir), **variables}
        command = ["sbatch", "--parsable", *ON_BOTH, f"--output={folder}/%j.out", *options]
        self.id = int(slurm.run("head", [*command, SCRIPTS / script, "tiny.py"], env=exported).check().stdout)

    def order(self, text: str, start: int = 0) -> None:
        """What the ranks are to do at a start of the job."""
        (self.work_dir / f"order-{start}").write_text(text, encoding="ascii")

    def wait_for_ranks(self, start: int = 0) -> None:
        """Wait until all ranks run."""
        deadline = time.monotonic() + 60
        while len(list(self.work_dir.glob(f"running-{start}-*"))) < self.ranks:
            assert time.monotonic() < deadline, self.slurm.log(self.slurm.job(self.id))
            time.sleep(0.05)

    def restart(self, number: int = 1) -> None:
        """Wait until the job is back in the queue for the ``number``-th time, and let it start."""
        self.slurm.wait_until(
            self.id, lambda job: (job["JobState"], job["Restarts"]) == ("PENDING", str(number)), timeout=60
        )
        release(self.slurm, self.id)

    def end(self, timeout: float = 60.0) -> dict[str, str]:
        """The job's fields once it has ended."""
        return self.slurm.wait(self.id, timeout)

    @property
    def log(self) -> str:
        """What the job script has printed."""
        return self.slurm.log(self.slurm.job(self.id))


def write_site(folder: Path) -> Path:
    """A site's file by which the ranks are stand-ins."""
    stand_in = folder / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN, encoding="ascii")
    stand_in.chmod(0o755)
    site = folder / "site.sh"
    site.write_text(f'PATH="{stand_in.parent}:$PATH"\n', encoding="utf-8")
    return site


def release(slurm: Slurm, job_id: int | str) -> None:
    """Start a job that was put back, without the two minutes that SLURM has it wait."""
    time.sleep(SECONDS_BEFORE_RELEASE)
    slurm.run("head", ["scontrol", "update", f"JobId={job_id}", "StartTime=now"]).check()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a blank in its path."""
    (tmp_path / "my runs").mkdir()
    return tmp_path / "my runs"


@pytest.fixture(autouse=True)
def nothing_left(slurm: Slurm) -> Iterator[None]:
    """No job of a test outlives it."""
    yield
    slurm.run("head", ["scancel", "--user=root"])
    slurm.wait_for_nodes()


def test_the_notice_of_the_time_limit_puts_it_back(slurm: Slurm, folder: Path) -> None:
    """The notice comes to the job script alone, which has to pass it on."""
    job = Job(slurm, folder)
    job.wait_for_ranks()
    slurm.run("head", ["scancel", "--signal=USR1", "--batch", str(job.id)]).check()
    job.order("end 0", start=1)
    job.restart()
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    for said in ("asked to stop", "status 75", "back into the queue", "start 1 on", "status 0"):
        assert said in job.log
    # Each rank's file has both starts.
    for rank in (0, 1):
        log = (job.work_dir / "slurm" / str(job.id) / f"rank-{rank}.log").read_text()
        assert [line.split(" of ")[0] for line in log.splitlines() if line.startswith("==")] == [
            "== start 0",
            "== start 1",
        ]
    # The job's own log has the error lines, of this start, and whose they are.
    assert job.log.count("rank-1: error: ends with 0") == 1


def test_a_job_from_inside_another_is_itself(slurm: Slurm, folder: Path) -> None:
    """`sbatch` hands the variables of the job around it on, and SLURM replaces only some."""
    around = {"SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    tasks = {"SLURM_CPUS_PER_TASK": "3", "SLURM_NTASKS_PER_NODE": "7", "SLURM_NTASKS": "9"}
    job = Job(slurm, folder, **around, **tasks)
    job.wait_for_ranks()
    slurm.run("head", ["scancel", "--signal=USR1", "--batch", str(job.id)]).check()
    job.order("end 0", start=1)
    job.restart()
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert f"job {job.id}: start 0" in job.log and f"job {job.id}: start 1" in job.log
    assert (job.work_dir / "slurm" / str(job.id) / "rank-1.log").is_file()


def test_a_limit_that_leaves_no_time_ends_it(slurm: Slurm, folder: Path) -> None:
    """The notice comes with the start, and would at each start."""
    job = Job(slurm, folder, ["--time=30"])
    job.order("stop without saving")
    job.wait_for_ranks()
    # Not from the first: SLURM looks every half minute, and ranks that it finds just being started die of the signal.
    slurm.run("head", ["scontrol", "update", f"JobId={job.id}", "TimeLimit=2"]).check()
    ended = job.end(120)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    assert "the time limit came before a checkpoint" in job.log


def test_a_job_that_is_not_to_go_back_ends(slurm: Slurm, folder: Path) -> None:
    job = Job(slurm, folder, ["--no-requeue"])
    job.order("save, end 1")
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0")
    assert "not tried again: submitted with --no-requeue" in job.log


def test_a_work_dir_of_each_nodes_own(slurm: Slurm, folder: Path, local_disk: Path) -> None:
    """Only `--logs` is seen by all hosts; the checkpoints that count are on the first node."""
    work_dir, logs = local_disk / "the work", folder / "the logs"
    for host in ("n1", "n2"):
        place = slurm.path(host, work_dir)
        place.mkdir()
        (place / "order-0").write_text("save, end 1", encoding="ascii")
        (place / "order-1").write_text("end 0", encoding="ascii")
    options = ["--nodes=2", "--gpus-per-node=0", f"--logs={logs}", f"--site={write_site(folder)}"]
    command = ["python", "launch/submit.py", write_config(folder / "tiny.py"), *options, "--", "--work-dir", work_dir]
    said = slurm.run("head", command).check().stdout
    job_id = int(next(line.split()[1] for line in said.splitlines() if line.startswith("job ")))
    slurm.wait_until(job_id, lambda job: job["JobState"] == "FAILED" or job["Restarts"] == "1", timeout=60)
    assert "a checkpoint was saved since this start" in (logs / f"{job_id}.out").read_text()
    release(slurm, job_id)
    assert slurm.wait(job_id)["JobState"] == "COMPLETED"
    for rank in (0, 1):
        assert (logs / str(job_id) / f"rank-{rank}.log").read_text().count("== start") == 2
    assert not work_dir.exists(), "nothing where the job was submitted"


def test_a_cancelled_job_ends(slurm: Slurm, folder: Path) -> None:
    job = Job(slurm, folder)
    job.wait_for_ranks()
    slurm.run("head", ["scancel", str(job.id)]).check()
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert (job.work_dir / "checkpoints" / "latest").is_file(), "the ranks had the time for a checkpoint"
    time.sleep(2)
    assert slurm.state_of(job.id) == "CANCELLED"
    for host in ("n1", "n2"):
        assert slurm.processes(host, f"SLURM_JOB_ID={job.id}") == []


def start_taking_nodes(slurm: Slurm) -> RunningCommand:
    """Start a job on both nodes that preempts what is there."""
    return slurm.start("head", ["srun", "--partition=high", "--nodes=2", "--exclusive", "true"], timeout=180)


def take_nodes(slurm: Slurm) -> None:
    """As ``start_taking_nodes``, to the job's end."""
    start_taking_nodes(slurm).wait().check()


def notice(slurm: Slurm, sent: bool) -> contextlib.AbstractContextManager[None]:
    """Whether preemption sends the signal of --signal first."""
    return contextlib.nullcontext() if sent else slurm.no_notice()


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("partition", ["low", "lowc"])
def test_a_preempted_job_goes_on(slurm: Slurm, folder: Path, partition: str, sent: bool) -> None:
    """Whether SLURM would requeue it or cancel it, and whether it says so to the script or to the ranks."""
    with notice(slurm, sent):
        job = Job(slurm, folder, ["--exclusive", f"--partition={partition}"])
        job.wait_for_ranks()
        started = time.monotonic()
        take_nodes(slurm)
        # Not after the grace time: the nodes are free once the ranks have ended.
        assert time.monotonic() - started < GRACE_SECONDS
        job.order("end 0", start=1)
        job.restart()
        ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert ("preempted: back" in job.log) and ("asked to stop" in job.log) is sent


def test_ranks_that_outlive_the_grace_time_go_on_too(slurm: Slurm, folder: Path) -> None:
    """Where SLURM would cancel the job, and has begun to."""
    with slurm.no_notice():
        job = Job(slurm, folder, ["--exclusive", "--partition=hasty"])
        job.order("stop slowly")
        job.wait_for_ranks()
        take_nodes(slurm)
        job.order("end 0", start=1)
        job.restart()
        ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def test_a_job_that_is_cancelled_in_its_grace_time_ends(slurm: Slurm, folder: Path) -> None:
    with slurm.no_notice():
        job = Job(slurm, folder, ["--exclusive", "--partition=low"])
        job.order("stop slowly")
        job.wait_for_ranks()
        high = start_taking_nodes(slurm)
        slurm.wait_until(job.id, lambda fields: fields.get("PreemptTime", "None") != "None")
        # SLURM's times are whole seconds, and a job that ends in that of its preemption counts as preempted.
        time.sleep(1.5)
        slurm.run("head", ["scancel", str(job.id)]).check()
        ended = job.end()
        high.wait().check()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.parametrize(
    ("order", "status", "said"),
    [
        ("end 2", "2:0", "has to be mended first"),
        ("save, end 2", "2:0", "has to be mended first"),
        ("end 1", "1:0", "status 1, and no checkpoint since this start"),
        ("end 76", "76:0", "status 76, and no checkpoint since this start"),
    ],
)
def test_a_hopeless_job_ends_with_its_status(slurm: Slurm, folder: Path, order: str, status: str, said: str) -> None:
    job = Job(slurm, folder)
    job.order(order)
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", status, "0")
    assert said in job.log


def test_a_job_that_fails_again_and_again_in_the_same_place_ends(slurm: Slurm, folder: Path) -> None:
    """One with a checkpoint goes back once, and a killed rank is no other matter."""
    job = Job(slurm, folder)
    job.order("save, die")
    job.order("end 1", start=1)
    job.restart()
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "1")
    assert "the ranks ended with status 137" in job.log and "a checkpoint was saved since this start" in job.log


def test_the_number_of_restarts_is_limited(slurm: Slurm, folder: Path) -> None:
    job = Job(slurm, folder, SPT_RESTARTS="0")
    job.order("save, end 1")
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "it has been back in the queue 0 times (SPT_RESTARTS)" in job.log


def test_each_task_of_an_array_goes_back_by_itself(slurm: Slurm, folder: Path) -> None:
    """The id of one of them stands for the whole array, too."""
    job = Job(slurm, folder, ["--array=0-1", "--nodes=1"], 1, script="array.sbatch", SPT_MEMBERS="one\ntwo")
    wait_until(lambda: all((job.work_dir / name / "running-0-0").is_file() for name in ("one", "two")))
    (job.work_dir / "two" / "order-0").write_text("end 0")
    slurm.run("head", ["scancel", "--signal=USR1", "--batch", f"{job.id}_0"]).check()
    (job.work_dir / "one" / "order-1").write_text("end 0")
    tasks = [f"{job.id}_{task}" for task in (0, 1)]
    wait_until(lambda: "JobState=PENDING" in show(slurm, tasks[0]))
    release(slurm, tasks[0])
    wait_until(lambda: all("JobState=COMPLETED" in show(slurm, task) for task in tasks))
    assert ["Restarts=1 " in show(slurm, task) for task in tasks] == [True, False]


def show(slurm: Slurm, job: str) -> str:
    """What SLURM knows of a job or a task of an array."""
    return slurm.run("head", ["scontrol", "show", "job", "-o", job]).check().stdout


def test_a_job_goes_on_after_its_node_was_lost(slurm: Slurm, folder: Path) -> None:
    job = Job(slurm, folder)
    job.wait_for_ranks()
    job.order("end 0", start=1)
    with slurm.cut_off("n2"):
        slurm.wait_until(job.id, lambda fields: fields["Restarts"] == "1", timeout=180)
    slurm.wait_for_nodes()
    job.restart()
    assert job.end()["JobState"] == "COMPLETED"
