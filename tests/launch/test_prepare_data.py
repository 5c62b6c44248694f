"""``launch/prepare_data.py`` as it is run."""

import shutil
import time
from pathlib import Path

import pytest

from tests.data.pictures_for_tests import write_image
from tests.launch.processes import Launch, RunningScript, run_all, run_script, snapshot, standing_still

pytestmark = [pytest.mark.slow, pytest.mark.segmentation, pytest.mark.timeout(600)]

MAKE = ["prepare_data.py", "ade20k", "--num-train", "24", "--num-val", "3", "--size", "32", "--make-scenes"]
CHECK = ["prepare_data.py", "ade20k", "--check"]
VTAB, FOLDER, SHARDS = (["prepare_data.py", name] for name in ("vtab", "folder", "shards"))


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
    cases: dict[str, tuple[list[str | Path], str]] = {
        "no folder": ([*VTAB, "--convert", root, "--task", "cifar"], "error: --convert needs --shards: a new or empty"),
        "seed": ([*FOLDER, "--check", root, "--seed", "5"], "error: --seed goes with --convert, not with --check"),
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 1,200 training images and 30 others."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count, seed in (("train", 1200, 0), ("val", 30, 5000)):
        for place in range(count):
            write_image(root / split / f"class_{place % 3}" / f"{place}.png", seed + place)
    return root


def half_written(out: Path) -> list[Path]:
    """What a process that is killed leaves of a shard."""
    return list(out.glob(".train-*.tar.*"))


def kill_in_mid_write(running: RunningScript, out: Path, num_complete: int) -> None:
    """SIGKILL behind some shards, while another is being written."""
    while True:
        assert running.is_running(), "the conversion was over before it could be killed"
        if len(list(out.glob("*.tar"))) >= num_complete and half_written(out):
            # Which is soon over: it can only be seen while nothing moves.
            with standing_still(running.processes()):
                if half_written(out):
                    running.kill()
                    return
        time.sleep(0.001)


def test_a_conversion_that_was_killed_goes_on(pictures: Path, tmp_path: Path) -> None:
    def convert(out: Path) -> list[str | Path]:
        return [*FOLDER, "--convert", pictures, "--shards", out, "--shard-size", "20", "--workers", "2"]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = run_script(convert(whole)).check()
    assert result.stdout.splitlines()[-2].startswith("train: 1,200 samples, 60 shards, ")
    for num_complete in (2, 15):
        running = RunningScript(convert(killed), "python", 1)
        try:
            kill_in_mid_write(running, killed, num_complete)
        finally:
            running.kill()
        assert running.wait(60).rc == -9
        assert num_complete <= len(list(killed.glob("*.tar"))) < 60
    assert half_written(killed)
    assert not (killed / "index.json").exists()
    result = run_script(convert(killed)).check()
    assert "of 1,230 samples are there" in result.stdout
    assert snapshot(killed) == snapshot(whole)


def test_lists_and_shards_from_end_to_end(pictures: Path, tmp_path: Path) -> None:
    shards, foreign = tmp_path / "shards", tmp_path / "foreign"
    bad = shutil.copytree(pictures, tmp_path / "bad")
    (bad / "val/class_0/3.png").write_bytes(b"")
    results = run_all(
        {
            "check": Launch([*FOLDER, "--check", bad]),
            "convert": Launch([*FOLDER, "--convert", pictures, "--shards", shards, "--seed", "3"]),
            "skip": Launch([*FOLDER, "--convert", bad, "--shards", tmp_path / "most", "--skip-bad-samples"]),
        }
    )
    assert results["check"].rc == 2
    assert results["check"].error_lines == [f"error: {bad}: 1 of its files are not what they should be, see above"]
    assert f"wrong: {bad}/val/class_0/3.png: is empty" in results["check"].stdout.splitlines()
    assert results["convert"].check().stdout.splitlines()[-1].startswith("val: 30 samples, 1 shards, ")
    assert results["skip"].check().stdout.splitlines()[-1] == "1 bad samples are left out"
    foreign.mkdir()
    for path in shards.glob("*.tar"):
        shutil.copy(path, foreign)
    (foreign / "names").write_text("\n".join(f"class_{k}" for k in range(3)))
    made = run_script([*SHARDS, "--index", foreign, "--classes", foreign / "names"]).check()
    assert made.stdout.splitlines()[-1].startswith("val: 30 samples, 1 shards, ")
    assert (foreign / "index.json").read_bytes() == (shards / "index.json").read_bytes()
    content = bytearray((foreign / "val-000000.tar").read_bytes())
    content[600] ^= 1
    (foreign / "val-000000.tar").write_bytes(content)
    results = run_all({name: Launch([*SHARDS, "--check", tmp_path / name]) for name in ("shards", "foreign")})
    assert results["shards"].check().stdout.splitlines()[-1] == "all files are good"
    assert results["foreign"].rc == 2
    wanted = f"wrong: {foreign}/val-000000.tar: sample 1 (key 00000000): is not what was written"
    assert wanted in results["foreign"].stdout
