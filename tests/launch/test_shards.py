"""Runs from shards: killed in the middle of an epoch, on other ranks and workers, over HTTP, with damage."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from spt_dist.data.lists.image_folder import folder_classes, read_image_folder
from spt_dist.data.shards.convert import convert
from spt_dist.data.shards.sources import source_of_lists
from spt_dist.exits import STOPPED
from tests.launch.processes import Launch, RunningScript, run_all, run_script
from tests.launch.runs import checkpoint_path, latest_step, read_losses, read_summary, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]

NUM_TRAIN, NUM_VAL = 201, 50
# Batches of 32: seven steps an epoch; four lanes on at most two ranks.
EPOCHS, STEPS_PER_EPOCH, SAVED_AT = 4, 7, 10
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files in folders, converted to shards of thirty."""
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for index in range(NUM_TRAIN + NUM_VAL):
        split = "train" if index < NUM_TRAIN else "val"
        path = folder / "files" / split / str(digits.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 15).astype(np.uint8)).resize((16, 16)).save(path)
    classes = folder_classes(folder / "files", "train")
    lists = {split: read_image_folder(folder / "files", split, classes) for split in ("train", "val")}
    convert(source_of_lists(lists), folder / "shards", num_threads=2, shard_size=30, show_progress=False)
    return folder / "shards"


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    """The shards' URL."""
    handler = partial(Quiet, directory=str(shards))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def write_shards_config(folder: Path, root: Path | str) -> Path:
    path = write_config(folder / "tiny.py", EPOCHS, proj_drop_rate=0.1)
    own = f"data = dict(image_size=16, num_train={NUM_TRAIN})"
    assert own in path.read_text()
    data = f"""data = dict(
    _delete_=True, type="shards", root={str(root)!r}, transform="vtab_inception", image_size=16, lanes=4, window=20,
    num_workers=0,
)"""
    path.write_text(path.read_text().replace(own, data) + "train.update(checkpoint_steps=5, keep_checkpoints=9)\n")
    return path


def test_a_run_goes_on_with_the_very_next_sample_with_workers_too(shards: Path, tmp_path: Path) -> None:
    config, whole, killed = write_shards_config(tmp_path, shards), tmp_path / "whole", tmp_path / "killed"
    # So long that it is not over before a test that was held up looks again.
    epochs = 4 * EPOCHS
    options = ["--cfg-options", f"train.epochs={epochs}"]
    workers = [*options, "data.num_workers=2"]
    running = RunningScript(["train.py", config, "--work-dir", killed, *workers], "python", 1)
    try:
        while latest_step(killed) < SAVED_AT:
            assert running.is_running()
            time.sleep(0.01)
    finally:
        running.kill()
    run_script(["train.py", config, "--work-dir", whole, *options]).check()
    wanted = read_losses(whole)
    assert list(wanted) == list(range(1, epochs * STEPS_PER_EPOCH + 1))

    run_script(["train.py", config, "--work-dir", killed, "--resume", *workers]).check()
    assert read_losses(killed) == wanted, "to the last bit, though workers read"
    assert read_summary(killed)["scores"] == read_summary(whole)["scores"]


def test_another_number_of_ranks_goes_on_with_the_same_batches(shards: Path, server: str, tmp_path: Path) -> None:
    """Without dropout, of which each rank would draw its own."""
    config, whole, moved = write_shards_config(tmp_path, shards), tmp_path / "whole", tmp_path / "moved"
    still = ["--cfg-options", "model.kwargs.proj_drop_rate=0.0"]
    run_script(["train.py", config, "--work-dir", whole, *still]).check()
    shutil.copytree(whole, moved)
    saved = checkpoint_path(moved, SAVED_AT)
    assert saved.is_file(), "in the middle of an epoch"
    arguments = ["train.py", config, "--work-dir", moved, "--resume", saved, *still]
    run_script([*arguments, f"data.root={server}", "data.num_workers=1"], "torchrun", 2).check()
    wanted, found = read_losses(whole), read_losses(moved)
    assert list(found) == list(range(1, NUM_STEPS + 1))
    for step in range(SAVED_AT + 1, NUM_STEPS + 1):
        assert found[step] == pytest.approx(wanted[step], rel=1e-4), f"step {step}"


def test_damage_ends_the_run_or_is_left_out_alike_on_all_ranks(shards: Path, tmp_path: Path) -> None:
    root = shutil.copytree(shards, tmp_path / "shards")
    shard = sorted(root.glob("train-*.tar"))[2]
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # in the first image
    # The rest of the shard is cut off, in the middle of a file.
    half = len(content) // 2 // 512 * 512 + 100
    shard.write_bytes(bytes(content[:half]) + b"\0" * (len(content) - half))
    config = write_shards_config(tmp_path, root)
    still = ["--cfg-options", "model.kwargs.proj_drop_rate=0.0", "sensitivity.num_samples=201"]
    skipping = ["train.py", config, "--skip-bad-samples"]
    results = run_all(
        {
            "refused": Launch(["train.py", config, "--work-dir", tmp_path / "refused", *still]),
            "one": Launch([*skipping, "--work-dir", tmp_path / "one", *still]),
            "two": Launch([*skipping, "--work-dir", tmp_path / "two", *still], "torchrun", 2),
        }
    )
    assert results["refused"].rc == 2
    assert str(shard) in results["refused"].error_lines[0]
    counts = []
    for name in ("one", "two"):
        text = " ".join((results[name].check().stdout + results[name].stderr).split())
        assert "left out" in text
        (count,) = {words.split()[-1] for words in text.split(" of 201 training samples were left out")[:-1]}
        counts.append(int(count))
    assert counts[0] == counts[1]
    assert 10 < counts[0] < 30, "the first sample, and what lay behind the damage"
    one, two = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    for step in range(1, NUM_STEPS + 1):
        assert two[step] == pytest.approx(one[step], rel=1e-3), f"step {step}"


def test_a_missing_shard_is_told_before_anything_else(shards: Path, tmp_path: Path) -> None:
    root = shutil.copytree(shards, tmp_path / "shards")
    missing = sorted(root.glob("val-*.tar"))[1]
    missing.unlink()
    config = write_shards_config(tmp_path, root)
    result = run_script(["train.py", config, "--work-dir", tmp_path / "out"], "torchrun", 2)
    assert result.rc != 0
    (line,) = result.error_lines
    assert str(missing) in line
    assert not (tmp_path / "out").exists()


def test_a_signal_to_all_processes_ends_in_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    """As SLURM sends it: to the rank and to its workers."""
    config, work_dir = write_shards_config(tmp_path, shards), tmp_path / "out"
    arguments = ["train.py", config, "--work-dir", work_dir, "--resume", "--cfg-options", "data.num_workers=2"]
    running = RunningScript([*arguments, "train.epochs=2000"], "python", 1)
    try:
        while latest_step(work_dir) < SAVED_AT:
            assert running.is_running()
            time.sleep(0.01)
        processes = running.processes()
        assert len(processes) >= 3
        for pid in processes:
            # Those that read for an evaluation may have ended with it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        result = running.wait(120)
    finally:
        running.kill()
    assert result.rc == STOPPED, result.stderr
    assert latest_step(work_dir) == len(read_losses(work_dir)) > SAVED_AT
