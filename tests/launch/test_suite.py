"""A suite from the command line: killed in its second task, resumed, and its table."""

import json
import time
from pathlib import Path

import pytest

from tests.launch.processes import RunningScript, run_script
from tests.launch.runs import write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(400)]


def test_a_killed_suite_goes_on_and_ends_in_a_table(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write_config(tmp_path / f"{name}.py", epochs=2)
    suite = tmp_path / "all.py"
    suite.write_text('suite = dict(groups=dict(low=["one.py", "two.py"], high=["three.py"]))\n')
    out = tmp_path / "out"
    arguments = ["train.py", suite, "--work-dir", out, "--resume"]
    running = RunningScript(arguments, "torchrun", 2)
    try:
        while not (out / "two" / "checkpoints").is_dir():
            assert running.is_running(), "ended before its second task"
            time.sleep(0.02)
    finally:
        running.kill()
    first = (out / "one" / "task.safetensors").stat().st_mtime_ns
    result = run_script(arguments, "torchrun", 2).check()
    assert (out / "one" / "task.safetensors").stat().st_mtime_ns == first, "a finished task is not run again"
    assert "task 1 of 3: one is finished" in " ".join(result.stdout.split())
    scores = {
        name: json.loads((out / name / "summary.json").read_text())["scores"]["top1"]
        for name in ("one", "two", "three")
    }
    table = (out / "suite.txt").read_text()
    assert table.strip() in result.stdout
    group_mean = ((scores["one"] + scores["two"]) / 2 + scores["three"]) / 2
    assert f"{100 * group_mean:.1f}" in next(line for line in table.splitlines() if "group mean" in line)
    assert (out / "suite.png").is_file()


def test_what_a_suite_does_not_take_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path / "one.py")
    (tmp_path / "all.py").write_text('suite = dict(groups=dict(low=["one.py"]))\n')
    # Nothing of the first is trained where the second's data are missing.
    (tmp_path / "far.py").write_text(
        "_base_ = ['one.py']\ndata = dict(_delete_=True, type='shards', root='gone', transform='vtab')\n"
    )
    (tmp_path / "two.py").write_text('suite = dict(groups=dict(low=["one.py", "far.py"]))\nwork_dir = "never"\n')
    for arguments, message in (
        ([tmp_path / "all.py", "--dry-run"], "--dry-run"),
        ([tmp_path / "one.py", "--tasks", "one"], "--tasks"),
        ([tmp_path / "all.py", "--tasks", "on"], "one"),
        ([tmp_path / "one.py", "--member", "one"], "--member"),
        ([tmp_path / "all.py", "--member", "on"], "one"),
        ([tmp_path / "all.py", "--member", "one", "--tasks", "one"], "--tasks"),
        ([tmp_path / "two.py"], "gone/index.json"),
        ([tmp_path / "one.py", "--cfg-options", "data.root=pipe:cat x/{}"], "blanks"),
    ):
        result = run_script(["train.py", *arguments])
        assert result.rc == 2
        assert message in result.error_lines[0]
