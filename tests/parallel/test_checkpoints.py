"""Checkpoint files under faults."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spt_dist import UserError, inject
from spt_dist.parallel.checkpoints import SampleOrder, find_checkpoint, load_checkpoint, save_checkpoint
from tests.models_for_tests import make_vit
from tests.tuning.plans_for_tests import random_plan

ORDER = SampleOrder(seed=4, batch_size=16, num_train=100)
STATE = {"param/head.weight": torch.rand(10, 24)}


def save(folder: Path, num_steps: int) -> Path:
    """Write a checkpoint of an untrained model."""
    model = make_vit()
    return save_checkpoint(folder, STATE, inject(model, random_plan(model, 1)), num_steps, ORDER, keep=2)


def test_round_trip_and_the_last_two_are_kept(tmp_path: Path) -> None:
    for num_steps in (5, 10, 100, 1000):
        save(tmp_path, num_steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-00000100.safetensors",
        "step-00001000.safetensors",
    ]
    found = find_checkpoint("auto", tmp_path)
    assert found is not None
    checkpoint = load_checkpoint(found)
    assert (checkpoint.num_steps, checkpoint.order) == (1000, ORDER)
    checkpoint.check_order(ORDER)
    with pytest.raises(UserError, match="with batch_size=16, this one has batch_size=8"):
        checkpoint.check_order(SampleOrder(4, 8, 100))
    assert torch.equal(checkpoint.state["param/head.weight"], STATE["param/head.weight"])
    assert checkpoint.plan.summary() == random_plan(make_vit(), 1).summary()


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path) is None
    with pytest.raises(UserError, match="no such checkpoint"):
        find_checkpoint(str(tmp_path / "step-1.safetensors"), tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk: Path) -> None:
    good = save(small_disk, 5)
    model = make_vit()
    big = {"param/head.weight": torch.rand(300, 300)}
    with pytest.raises(Exception, match="No space left"):
        save_checkpoint(small_disk, big, inject(model, random_plan(model, 1)), 10, ORDER, keep=2)
    assert find_checkpoint("auto", small_disk) == good
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", good.name]
    load_checkpoint(good)


def test_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=rf"{path.name}.*truncated"):
        load_checkpoint(path)
    plan = tmp_path / "plan.safetensors"
    random_plan(make_vit(), 1).save(plan)
    with pytest.raises(UserError, match="this is a plan file, not a checkpoint file"):
        load_checkpoint(plan)
    path.unlink()
    with pytest.raises(UserError, match="latest: names step-00000005"):
        find_checkpoint("auto", tmp_path)
