"""launch/submit.py: the script that it writes, what it submits, and what it refuses beforehand."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from spt_dist import UserError
from tests.launch.processes import ROOT, run_script, snapshot
from tests.launch.runs import write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

# Stands for SLURM's: notes what it is given, and gives out job ids from 71 on, but for a script that it is to refuse.
SBATCH = """#!/usr/bin/env bash
here=$(dirname "$0")
printf '%s\\n' "$@" "" >>"$here/submitted"
env | grep ^SLURM_ >>"$here/environment"
[[ ! -e $here/refuse || $* != *$(<"$here/refuse") ]] || { echo "sbatch: error: Invalid account" >&2; exit 1; }
echo "$((71 + $(grep -c '^$' "$here/submitted") - 1));cluster"
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module, whose imports take seconds."""
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        return importlib.import_module("submit")
    finally:
        sys.path.remove(str(ROOT / "launch"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with an ``sbatch``, which notes what it is given in ``submitted``."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH, encoding="utf-8")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """One task's."""
    return write_config(tmp_path / "my configs" / "tiny.py")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Of three tasks."""
    folder = tmp_path / "suites"
    for name in ("one", "two", "three"):
        write_config(folder / f"{name}.py")
    path = folder / "all.py"
    path.write_text('suite = dict(groups=dict(low=["one.py", "two.py"], high=["three.py"]))\n', encoding="utf-8")
    return path


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """Call the script in this process."""
    monkeypatch.setattr(sys, "argv", ["submit.py", *map(str, arguments)])
    script.main()


def directives(path: Path) -> dict[str, str]:
    """Option -> value of a job script, "" for one without."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    assert len({name for name, _, _ in pairs}) == len(pairs), "an option stands there twice"
    return {name: value.strip('"') for name, _, value in pairs}


def test_a_script_is_written_and_submitted(
    script: ModuleType,
    slurm: Path,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "the 50% run"
    options = ["--nodes", "4", "--gpus-per-node", "8", "--cpus-per-task", "12", "--partition", "gpu", "--account", "a"]
    options += ["--qos", "q", "--time", "1-0", "--mem", "0", "--constraint", "x&y", "--name", "my job"]
    options += ["--notice", "300", "--launcher", "torchrun", "--sbatch", "mail-type=END", "exclusive"]
    passed = ["--work-dir", out, "--engine", "fsdp", "--cfg-options", "train.lr=1e-3", "train.epochs=3"]
    call(script, monkeypatch, config, *options, "--", *passed)
    path = out / "slurm" / "train.sbatch"
    assert directives(path) == {
        "job-name": "my job",
        "nodes": "4",
        "ntasks-per-node": "8",
        "requeue": "",
        "open-mode": "append",
        "signal": "B:USR1@300",
        "chdir": str(Path.cwd()),
        "output": f"{str(out).replace('%', '%%')}/slurm/%j.out",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "partition": "gpu",
        "account": "a",
        "qos": "q",
        "time": "1-0",
        "mem": "0",
        "constraint": "x&y",
        "mail-type": "END",
        "exclusive": "",
    }
    assert (slurm / "submitted").read_text(encoding="utf-8").splitlines() == ["--parsable", str(path), ""]
    said = capsys.readouterr().out
    assert f"sbatch --parsable '{path}'" in said
    assert ["job", "71"] in [line.split() for line in said.splitlines()]
    assert f"{out}/slurm/71.out" in said
    # What the ranks will run.
    body = path.read_text(encoding="utf-8").partition("\n\n")[2].partition("source ")[0]
    shown = subprocess.run(
        ["bash", "-c", body + 'printf "%s\\n" "$SPT_ROOT" "$SPT_LAUNCHER" "$SPT_FOLDER" "$@"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.splitlines() == [str(ROOT), "torchrun", str(out), str(config), *map(str, passed)]


def test_a_dry_run_writes_and_submits_nothing(
    script: ModuleType,
    slurm: Path,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(tmp_path)
    out = tmp_path / "out"
    call(script, monkeypatch, config, "--dry-run", "--", "--work-dir", out)
    said = capsys.readouterr().out
    assert said.startswith("#!/usr/bin/env bash\n")
    assert said.rstrip().endswith(f"# sbatch {out}/slurm/train.sbatch")
    assert snapshot(tmp_path) == before


def test_an_array_and_the_job_of_its_table(
    script: ModuleType,
    slurm: Path,
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = ["--job", "array", "--at-once", "2", "--tasks", "three", "one", "--gpus-per-node", "0"]
    options += ["--tasks-per-node", "3", "--account", "a", "--constraint", "x86", "--mem", "9G", "--time", "3:01"]
    options += ["--sbatch", "reservation=r", "exclusive", "licenses=x"]
    call(script, monkeypatch, suite, *options, "--", "--work-dir", out)
    array, table = out / "slurm" / "array.sbatch", out / "slurm" / "table.sbatch"
    found = directives(array)
    assert (found["array"], found["ntasks-per-node"]) == ("0,2%2", "3")
    assert found["output"] == f"{out}/slurm/%A_%a.out"
    assert "gpus-per-node" not in found
    assert "SPT_MEMBERS='one\ntwo\nthree'\n" in array.read_text(encoding="utf-8")
    asked = {"account": "a", "constraint": "x86", "time": "3:01", "reservation": "r"}
    found = directives(table)
    assert {name: value for name, value in found.items() if name in (*asked, "mem", "exclusive", "licenses")} == asked
    assert (found["ntasks-per-node"], found["output"]) == ("1", f"{out}/slurm/%j.out")
    assert f"set -- '{out}'" in table.read_text(encoding="utf-8") or f"set -- {out}" in table.read_text(
        encoding="utf-8"
    )
    submitted = (slurm / "submitted").read_text(encoding="utf-8").splitlines()
    assert submitted == ["--parsable", str(array), "", "--parsable", "--dependency=afterany:71", str(table), ""]
    described = json.loads((out / "suite.json").read_text(encoding="utf-8"))
    assert described["groups"] == {"low": ["one", "two"], "high": ["three"]}
    assert "72" in capsys.readouterr().out


def test_a_suite_as_one_job(
    script: ModuleType, slurm: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    call(script, monkeypatch, suite, "--tasks", "two", "--", "--work-dir", out)
    text = (out / "slurm" / "train.sbatch").read_text("utf-8")
    assert f"set -- {suite} --work-dir {out} --tasks two\n" in text
    assert "SPT_MEMBERS='one\ntwo\nthree'\n" in text


def test_logs_elsewhere(
    script: ModuleType, slurm: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the nodes have to see; nothing goes to the work dir, which may be there on other hosts only."""
    monkeypatch.chdir(tmp_path)
    call(script, monkeypatch, config, "--logs", "my logs", "--notice", "60", "--", "--work-dir", tmp_path / "out")
    path = tmp_path / "my logs" / "train.sbatch"
    assert directives(path)["output"] == f"{tmp_path}/my logs/%j.out"
    text = path.read_text(encoding="utf-8")
    assert "SPT_LOGS='my logs'\n" in text and "SPT_NOTICE=60\n" in text
    assert not (tmp_path / "out").exists()


def test_the_variables_of_a_job_around_it_stay_behind(
    script: ModuleType, slurm: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_ARRAY_JOB_ID": "9", "SLURM_RESTART_COUNT": "2", "SLURM_CONF": "/my/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    call(script, monkeypatch, config, "--", "--work-dir", tmp_path / "out")
    assert (slurm / "environment").read_text(encoding="utf-8") == "SLURM_CONF=/my/slurm.conf\n"


def test_an_array_whose_table_is_refused_is_told(
    script: ModuleType,
    slurm: Path,
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (slurm / "refuse").write_text("table.sbatch", encoding="utf-8")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"table.*Invalid account.*job 71, goes on.*launch/report\.py"):
        call(script, monkeypatch, suite, "--job", "array", "--", "--work-dir", out)
    assert ["job", "71"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("job", "passed", "folder"),
    [
        ("sensitivity", ["--out", "{}/scores"], "scores"),
        ("evaluate", ["--task", "{}/run/task.safetensors"], "run"),
        ("evaluate", ["--merged", "{}/other/merged.safetensors"], "other"),
    ],
)
def test_where_the_other_jobs_write(
    script: ModuleType,
    slurm: Path,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: str,
    passed: list[str],
    folder: str,
) -> None:
    arguments = [word.format(tmp_path) for word in passed]
    call(script, monkeypatch, config, "--job", job, "--", *arguments)
    assert (tmp_path / folder / "slurm" / f"{job}.sbatch").is_file()
    capsys.readouterr()
    # As the scripts that ship ask.
    call(script, monkeypatch, config, "--job", job, "--show", "--", *arguments)
    assert capsys.readouterr().out == f"SPT_FOLDER={tmp_path}/{folder}\n"


def test_what_the_scripts_that_ship_ask(
    script: ModuleType, suite: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    members = "SPT_MEMBER=one\nSPT_MEMBER=two\nSPT_MEMBER=three\n"
    call(script, monkeypatch, suite, "--job", "array", "--show")
    assert capsys.readouterr().out == f"SPT_FOLDER=work_dirs/suites_all\n{members}"
    call(script, monkeypatch, suite, "--show", "--", "--work-dir", "w", "--resume", "--cfg-options", "seed=1")
    assert capsys.readouterr().out == f"SPT_FOLDER=w\n{members}"


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("config", "-- --cfg-options train.epoch=3", r"train\.epoch is unknown; did you mean 'epochs'"),
        ("config", "-- --engine ddpp", r"ddpp.*ddp"),
        ("config", "-- --cfg-options method.rankk=3", r"rankk.*rank"),
        ("config", "-- --resume w/checkpoints/step-00000007.safetensors", r"--resume w/.*goes on from its own latest"),
        ("config", "--job array", r"--job array: .*tiny\.py is one task's config"),
        ("config", "--tasks one", r"--tasks: .*tiny\.py is one task's config"),
        ("config", "--job sensitivity", r"add `-- --out DIR`"),
        ("config", "--job evaluate", r"add `-- --task FILE`"),
        ("config", "--nodes 0", r"--nodes 0: has to be at least 1"),
        ("config", "--gpus-per-node -1", r"--gpus-per-node -1: has to be at least 0"),
        ("config", "--notice 5", r"--notice 5: has to be at least 10"),
        ("config", "--tasks-per-node 4", r"--tasks-per-node 4: is for --gpus-per-node 0"),
        ("config", "--at-once 4", r"--at-once 4: is for --job array"),
        ("config", "--site nowhere.sh", r"--site nowhere\.sh: no such file"),
        ("config", "--sbatch N=2", r"KEY=VALUE"),
        ("config", "--sbatch array=0-3", r"--sbatch array: take --job array"),
        ("suite", "--job array --sbatch signal=USR1@9", r"--sbatch signal: take --notice"),
        ("config", "--time 2", r"--time 2: has to be above the --notice of 120 s and 60 s more"),
        ("config", "--time 3", r"--time 3: has to be above"),
        ("config", "--time 1:00:00 --notice 3600", r"--time 1:00:00: has to be above"),
        ("config", "--time 1-0 --sbatch time=2", r"--time 2: has to be above"),
        ("config", "--time soon", r"--time soon: has to be M, M:S"),
        ("config", "-- --work-dir a\\b", r"a\\b/slurm: has a backslash"),
        ("suite", "--job array --logs a\\b", r"a\\b: has a backslash"),
        ("suite", "--job evaluate -- --task t", r"--job evaluate: .*all\.py is a suite"),
        ("suite", "--job array --tasks thre", r"thre.*three"),
        ("suite", "--job array -- --tasks one", r"--tasks one: of an array, give it before the --"),
        ("suite", "-- --cfg-options method.rankk=3", r"one\.py: .*rankk"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    script: ModuleType,
    slurm: Path,
    config: Path,
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    arguments: str,
    message: str,
) -> None:
    path = config if kind == "config" else suite
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message):
        call(script, monkeypatch, path, *arguments.split())
    assert snapshot(tmp_path) == before


def test_what_sbatch_says_is_told(
    script: ModuleType, slurm: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm / "refuse").touch()
    with pytest.raises(UserError, match=r"train\.sbatch: sbatch: error: Invalid account"):
        call(script, monkeypatch, config, "--", "--work-dir", tmp_path / "out")


def test_without_slurm_one_line_says_so(config: Path, tmp_path: Path) -> None:
    """Exit status 2, and no traceback; nothing is written."""
    out = tmp_path / "out"
    bare = str(Path(sys.executable).parent)
    result = run_script(["submit.py", config, "--", "--work-dir", out], env={"PATH": bare})
    assert result.rc == 2
    assert [line.split(":")[1] for line in result.error_lines] == [" sbatch"]
    assert not out.exists()
