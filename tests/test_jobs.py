"""Job scripts: what is written into them, and which ends of a job put it back into the queue."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from spt_dist import UserError
from spt_dist.jobs import array_indices, parse_directives, plain_path, render_script, time_limit

FOLDER = Path(__file__).parents[1] / "launch" / "slurm"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
TEMPLATE = """#!/usr/bin/env bash
# Says what it is given.
#SBATCH --nodes=1
#SBATCH --requeue

for word in "$ONE" "$@"; do echo "<$word>"; done
"""
# Stands for SLURM's: it knows what the environment says, and is to be asked for times that can be read.
SCONTROL = """#!/usr/bin/env bash
[[ "$*/${SLURM_TIME_FORMAT:-}" == "show job -o 7/standard" ]] && echo "$RECORDS"
"""
AWKWARD = ["plain", "with blank", "it's", 'a "quote"', "$HOME `id` \\ *", "", "--cfg-options", "a=[1,2]", "two\nlines"]


def run_bash(script: str, *arguments: str, **variables: str) -> str:
    """What a bash script prints."""
    command = ["bash", "-c", script, "bash", *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_job_script(folder: Path, script: str, *arguments: str, records: str = "", **variables: str) -> str:
    """What bash prints with job.sh's functions, in job 7 of a SLURM whose ``scontrol`` is in this folder."""
    stand_in = folder / "bin" / "scontrol"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(SCONTROL, encoding="ascii")
    stand_in.chmod(0o755)
    inside = {"PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    known = {"RECORDS": dated(records or shown("RUNNING")), **inside, **variables}
    return run_bash(f'source "{FOLDER}/job.sh"\n{script}', *arguments, **known)


def test_arguments_and_variables_reach_the_commands_as_they_are() -> None:
    script = render_script(TEMPLATE, {}, {"ONE": "o n'e"}, AWKWARD)
    assert run_bash(script) == "".join(f"<{word}>\n" for word in ["o n'e", *AWKWARD])


def test_directives_replace_those_of_the_template() -> None:
    script = render_script(TEMPLATE, {"nodes": "4", "exclusive": None, "output": '/my "runs"\\%j.out'}, {}, [])
    head = script.partition("\n\n")[0].splitlines()
    assert head[0] == "#!/usr/bin/env bash"
    assert [line for line in head if line.startswith("#SBATCH")] == [
        "#SBATCH --nodes=4",
        "#SBATCH --requeue",
        "#SBATCH --exclusive",
        '#SBATCH --output="/my \\"runs\\"\\\\%j.out"',
    ]
    assert script.count("#SBATCH") == 4


def test_no_requeue_replaces_requeue() -> None:
    script = render_script(TEMPLATE, {"no-requeue": None}, {}, [])
    assert [line for line in script.splitlines() if "requeue" in line] == ["#SBATCH --no-requeue"]


@pytest.mark.parametrize("value", ["a\nb", "4\n#SBATCH --nodes=9"])
def test_a_directive_is_one_line(value: str) -> None:
    with pytest.raises(UserError, match="one line"):
        render_script(TEMPLATE, {"comment": value}, {}, [])


def test_further_directives() -> None:
    items = ["mail-type=END", "exclusive", "--comment=a=b", "reservation="]
    assert parse_directives(items) == {"mail-type": "END", "exclusive": None, "comment": "a=b", "reservation": ""}
    for wrong in ("-N2", "mem per cpu=4", "=x", "--"):
        with pytest.raises(UserError, match="KEY=VALUE"):
            parse_directives([wrong])


def test_the_places_of_an_array() -> None:
    names = ["a", "b", "c", "d"]
    assert array_indices(names, [], None) == "0-3"
    assert array_indices(names, [], 2) == "0-3%2"
    assert array_indices(names, ["d", "a", "c"], 1) == "0,2,3%1"
    assert array_indices(names, ["c", "b"], None) == "1-2"
    assert array_indices(names, ["b"], None) == "1-1"


def test_percent_signs_of_a_path_stand_for_themselves() -> None:
    assert plain_path("/runs/50%j") == "/runs/50%%j"
    with pytest.raises(UserError, match=r"/runs/a\\b: has a backslash"):
        plain_path("/runs/a\\b")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("8:00:00", 28800),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-2:30:15", 95415),
        ("0-0:5", 300),
        ("0", None),
        ("00:00", None),
        ("-1", None),
        ("UNLIMITED", None),
        ("infinite", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "1:", "1-", "abc", "1h", "1.5", "1-0:0:0:0", "1:0:0:0", " 5", "5\n"])
def test_what_is_no_time_limit(text: str) -> None:
    with pytest.raises(UserError, match="has to be M, M:S"):
        time_limit(text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", "--external-sources", script], check=True, cwd=FOLDER.parents[1])


def shown(state: str, restarts: int = 0, elapsed: int = 60, left: int = 3600, **fields: str) -> str:
    """What `scontrol show job -o` says of a job; its times are seconds from now, which ``dated`` puts in."""
    known = {
        "JobId": "7",
        "JobName": "a b",
        "UserId": "u(1)",
        "JobState": state,
        "Reason": "None",
        "Restarts": str(restarts),
    }
    known |= {"StartTime": f"<{-elapsed}>", "EndTime": f"<{left}>"}
    return " ".join(f"{name}={value}" for name, value in {**known, **fields}.items())


def dated(records: str) -> str:
    """With times from now on: tests run long after they are collected."""
    return re.sub(
        r"<(-?\d+)>",
        lambda found: (datetime.now() + timedelta(seconds=int(found[1]))).isoformat(timespec="seconds"),
        records,
    )


EARLIER, NOW = "2026-01-01T00:00:00", "2026-01-01T00:00:10"
CANCELLED = shown("COMPLETING", EndTime=NOW)
PREEMPTED = shown("RUNNING", EndTime=NOW, PreemptTime=EARLIER)
KILLED_BY_PREEMPTION = shown("COMPLETING", EndTime=NOW, PreemptTime=NOW)
CANCELLED_IN_GRACE_TIME = shown("COMPLETING", EndTime=NOW, PreemptTime=EARLIER)
AT_ITS_LIMIT = shown("COMPLETING", Reason="TimeLimit", EndTime=NOW)
RUNNING = shown("RUNNING")
LATE = shown("RUNNING", elapsed=3600, left=120)
# The notice of a limit of two minutes comes at the start.
SHORT = shown("RUNNING", elapsed=5, left=175)
HALF_OVER = shown("RUNNING", elapsed=3600, left=200)
UNLIMITED = shown("RUNNING", elapsed=3600, EndTime="Unknown")


@pytest.mark.parametrize(
    ("state", "status", "notice", "checkpoint", "goes_back", "why"),
    [
        (RUNNING, 0, False, True, False, "done"),
        (RUNNING, 0, True, True, False, "done"),
        (RUNNING, 75, True, True, True, "checkpoint"),
        (RUNNING, 75, True, False, True, "asked to stop"),
        (RUNNING, 75, False, False, True, "asked to stop"),
        (RUNNING, 138, True, False, True, "asked to stop"),
        (UNLIMITED, 75, True, False, True, "asked to stop"),
        (LATE, 75, True, True, True, "checkpoint"),
        (LATE, 75, True, False, False, "the time limit came before a checkpoint"),
        (SHORT, 75, True, True, True, "checkpoint"),
        (SHORT, 75, True, False, False, "the time limit came before a checkpoint"),
        (HALF_OVER, 75, True, False, True, "asked to stop"),
        (shown("RUNNING", left=100, PreemptTime=NOW), 75, True, False, True, "preempted"),
        (shown("RUNNING", Requeue="0"), 75, True, True, False, "--no-requeue"),
        (shown("RUNNING", JobName="x Restarts=9 UserId=y(1) JobState=COMPLETING"), 76, False, True, True, "checkpoint"),
        (RUNNING, 76, False, True, True, "checkpoint"),
        (RUNNING, 137, False, True, True, "checkpoint"),
        (RUNNING, 76, False, False, False, "status 76, and no checkpoint"),
        (RUNNING, 1, False, False, False, "status 1, and no checkpoint"),
        (RUNNING, 2, False, True, False, "mended"),
        (RUNNING, 2, True, True, False, "mended"),
        (PREEMPTED, 75, False, False, True, "preempted"),
        (PREEMPTED, 1, False, True, True, "preempted"),
        (PREEMPTED, 2, False, True, False, "mended"),
        (KILLED_BY_PREEMPTION, 75, False, False, True, "preempted"),
        (CANCELLED, 75, False, True, False, "cancelled"),
        (CANCELLED, 75, True, True, False, "cancelled"),
        (CANCELLED_IN_GRACE_TIME, 75, True, True, False, "cancelled"),
        (AT_ITS_LIMIT, 75, False, True, True, "checkpoint"),
        (AT_ITS_LIMIT, 75, True, False, False, "the time limit came before a checkpoint"),
        (shown("COMPLETING", restarts=1), 75, False, True, False, "SLURM has put it back"),
        ("", 75, True, True, False, "does not answer"),
    ],
)
def test_what_goes_back_into_the_queue(
    tmp_path: Path, state: str, status: int, notice: bool, checkpoint: bool, goes_back: bool, why: str
) -> None:
    said = decide(tmp_path, state, status, notice, checkpoint)
    assert said[0] == ("0" if goes_back else "1")
    assert why in said[1]


def decide(folder: Path, state: str, status: int, notice: bool, checkpoint: bool) -> Sequence[str]:
    """Status and words of ``reason_to_requeue``; there is a checkpoint of an earlier start."""
    script = """
    RUNS=("$1") NOTICE=$3 code=0 CHECKPOINTS=$(checkpoints)
    [ -z "$4" ] || echo step-2 >"$1/checkpoints/latest"
    # SLURM says it in the same words then.
    [ -n "$5" ] && RECORDS=$5 SHOWN=$(RECORDS=$5 show_job) || SHOWN=
    why=$(reason_to_requeue "$2") || code=$?
    echo "$code"
    echo "$why"
    """
    latest = folder / "run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step-1\n", encoding="ascii")
    given = [str(latest.parents[1]), str(status), "1" if notice else "", "1" if checkpoint else "", dated(state)]
    return run_job_script(folder, script, *given).splitlines()


def test_restarts_are_counted(tmp_path: Path) -> None:
    """The limit holds for preempted jobs too; SLURM's count is the job's own."""
    script = "RUNS=() CHECKPOINTS=; reason_to_requeue 75 || true"
    for restarts, said in ((2, "preempted"), (3, "not tried again: it has been back in the queue 3 times")):
        records = shown("RUNNING", restarts, PreemptTime=NOW)
        assert run_job_script(tmp_path, script, records=records, SPT_RESTARTS="3").startswith(said)


def test_other_checkpoints_are_no_progress(tmp_path: Path) -> None:
    """Neither those of a run in a folder below, nor one that is saved again, nor any where there is no training."""
    script = """
    RUNS=($1) CHECKPOINTS=$(checkpoints)
    for run in "$2" "$2/other"; do echo step-1 >"$run/checkpoints/latest"; done
    echo "${3:-step-1}" >"$2/checkpoints/latest"
    reason_to_requeue 76 || true
    """
    for run in (tmp_path, tmp_path / "other"):
        (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step-1\n", encoding="ascii")
    place = str(tmp_path)
    assert "no checkpoint since this start" in run_job_script(tmp_path, script, place, place)
    assert "no checkpoint since this start" in run_job_script(tmp_path, script, "", place, "step-2")
    assert "a checkpoint was saved" in run_job_script(tmp_path, script, place, place, "step-3")


@pytest.mark.parametrize(
    ("call", "members", "runs"),
    [
        ("run_job train", "", "/w"),
        ("run_job train", "a\nb c", "/w /w/a /w/b c"),
        ("run_job evaluate", "", ""),
        ("run_job sensitivity", "", ""),
        ("run_member", "a\nb c", "/w/b c"),
    ],
)
def test_whose_checkpoints_count(tmp_path: Path, call: str, members: str, runs: str) -> None:
    script = f"""
    cp() {{ :; }}; mkdir() {{ :; }}
    run_ranks() {{ echo "${{RUNS[*]}}"; }}
    SPT_FOLDER=/w SPT_MEMBERS=$1
    {call} config.py
    """
    records = shown("RUNNING", ArrayJobId="6", ArrayTaskId="1") if call == "run_member" else ""
    assert run_job_script(tmp_path, script, members, records=records).splitlines()[-1] == runs


# What a job has from a task of an array from inside of which it was submitted, where SLURM sets no value.
OF_ANOTHER = {
    "SLURM_ARRAY_JOB_ID": "99",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_CPUS_PER_TASK": "5",
    "SLURM_NTASKS_PER_NODE": "6",
    "SLURM_NTASKS": "9",
    "SLURM_TIME_FORMAT": "relative",
}


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"NumTasks": "4", "NtasksPerN:B:S:C": "0:0:*:*", "CPUs/Task": "1"}, "7//0/2/1/0/"),
        ({"NumTasks": "8", "NtasksPerN:B:S:C": "4:0:*:*", "CPUs/Task": "3"}, "7//0/4/3/0/3"),
        ({"NumTasks": "1", "CPUs/Task": "N/A"}, "7//0/1/1/0/"),
        ({"ArrayJobId": "7", "ArrayTaskId": "12"}, "7_12/12/0/1/1/0/"),
    ],
)
def test_what_holds_of_the_job_is_slurms_word(tmp_path: Path, fields: dict[str, str], known: str) -> None:
    """Of an array, the record of this task."""
    others = [shown("FAILED", 5, JobId=job, ArrayJobId="7", ArrayTaskId="1") for job in ("6", "77")]
    records = "\n".join([others[0], shown("RUNNING", **fields), others[1]])
    script = 'echo "$JOB/$ARRAY_TASK/$RESTARTS/$TASKS/$CPUS/$SLURM_RESTART_COUNT/${SLURM_CPUS_PER_TASK:-}"'
    said = run_job_script(tmp_path, script, records=records, **OF_ANOTHER, SLURM_JOB_NUM_NODES="2")
    assert said == known + "\n"


def test_the_sites_file_may_declare(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text('declare -x FROM_SITE="$SLURM_CPUS_PER_TASK"\nCONTAINER=(env "IN=it")\n', encoding="ascii")
    script = """"${IN_CONTAINER[@]}" bash -c 'echo "$FROM_SITE $IN"'"""
    records = shown("RUNNING", **{"CPUs/Task": "3"})
    assert run_job_script(tmp_path, script, records=records, SPT_SITE=str(site)) == "3 it\n"


def test_what_a_container_prints_is_no_answer(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        "#!/bin/sh\necho INFO: starting\nprintf 'SPT_FOLDER=%s\\nSPT_MEMBER=a b\\nSPT_MEMBER=c\\n' \"$*\"\n",
        encoding="ascii",
    )
    python.chmod(0o755)
    site = tmp_path / "site.sh"
    site.touch()
    script = """ask_submit train 'my config' --engine fsdp; echo "$SPT_FOLDER"; echo "$SPT_MEMBERS" """
    said = run_job_script(tmp_path, script, SPT_SITE=str(site))
    assert said == f"{FOLDER.parent}/submit.py my config --job train --show -- --engine fsdp\na b\nc\n"


@pytest.mark.parametrize(("gpus", "warned"), [("", False), ("1", False), ("8", True)])
def test_gpus_without_a_rank_are_told(tmp_path: Path, gpus: str, warned: bool) -> None:
    script = 'cp() { :; }; SPT_FOLDER=$1; prepare train config.py; ls "$LOGS/.."'
    said = run_job_script(tmp_path, script, str(tmp_path), **({"SLURM_GPUS_ON_NODE": gpus} if gpus else {}))
    assert ("GPUs of this node: 8; ranks: 1" in said) is warned
    assert said.splitlines()[-1] == "7"
