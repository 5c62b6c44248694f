"""``launch/prepare_data.py`` as it is run."""

import shutil
from pathlib import Path

import pytest

from tests.launch.processes import Launch, run_all, run_script, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.segmentation, pytest.mark.timeout(600)]

MAKE = ["prepare_data.py", "ade20k", "--num-train", "24", "--num-val", "3", "--size", "32", "--make-scenes"]
CHECK = ["prepare_data.py", "ade20k", "--check"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes that the script has drawn."""
    root = tmp_path_factory.mktemp("scenes") / "root"
    result = run_script([*MAKE, root]).check()
    assert result.stdout.splitlines()[-1] == str(root)
    return root


def test_checks(root: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(root, tmp_path / "damaged")
    for path in (damaged / "images/training").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    before = snapshot(damaged)
    results = run_all({"good": Launch([*CHECK, root]), "damaged": Launch([*CHECK, damaged])})
    good, bad = results["good"].check(), results["damaged"]
    assert "note: 24 training images; the released ADE20K has 20,210" in good.stdout
    assert good.stdout.splitlines()[-1] == "all files are good"
    assert bad.rc == 2
    assert bad.error_lines == [f"error: {damaged}: 24 of its files are not what they should be, see above"]
    listed = [line for line in bad.stdout.splitlines() if line.startswith("wrong: ")]
    assert len(listed) == 20
    assert listed[0].startswith(f"wrong: {damaged}/images/training/ADE_train_00000001.jpg: its end is missing")
    assert bad.stdout.splitlines()[-1] == "... and 4 more"
    assert snapshot(damaged) == before


def test_mistakes(root: Path, tmp_path: Path) -> None:
    cases = {
        "again": ([*MAKE, root], f"error: {root}: is there already; scenes go into a new or an empty folder"),
        "mixed": ([*CHECK, root, "--num-val", "5"], "error: --num-val goes with --make-scenes, not with --check"),
        "nowhere": ([*CHECK, tmp_path / "nowhere"], f"error: {tmp_path}/nowhere: no such folder; ADE20K unpacks to"),
    }
    before = snapshot(root)
    for name, result in run_all({name: Launch(arguments) for name, (arguments, _) in cases.items()}).items():
        assert result.rc == 2, name
        (line,) = result.error_lines
        assert line.startswith(cases[name][1])
        assert "Traceback" not in result.stderr
    assert snapshot(root) == before
