"""Checkpoint files under faults."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spt_dist import UserError, inject
from spt_dist.parallel.checkpoints import (
    Progress,
    RunIdentity,
    drop_later,
    find_checkpoint,
    load_checkpoint,
    mark_best,
    save_checkpoint,
)
from tests.disks import mounted_disk
from tests.models_for_tests import make_vit
from tests.ranks import run_ranks
from tests.tuning.plans_for_tests import random_plan

IDENTITY = RunIdentity(
    seed=4,
    batch_size=16,
    num_train=100,
    data={"type": "digits", "seed": 1},
    model={"name": "vit", "kwargs": {"depth": 2, "dims": (3, 4)}},
    method={"type": "spt", "budget": 100},
    schedule={"train": {"lr": 1e-3}},
)
STATE = {"param/head.weight": torch.rand(10, 24)}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(
    folder: Path, num_steps: int, keep: int = 2, best: float | None = None, identity: RunIdentity = IDENTITY
) -> Path:
    """Write a checkpoint of an untrained model."""
    tuned = inject(make_vit(), random_plan(make_vit(), 1))
    return save_checkpoint(folder, STATE, tuned, Progress(num_steps, best, num_steps), identity, keep)


def names(folder: Path) -> list[str]:
    """Files of a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_the_last_two_are_kept(tmp_path: Path) -> None:
    for num_steps in (5, 10, 100, 1000):
        save(tmp_path, num_steps, best=0.25)
    assert names(tmp_path) == ["latest", "step-00000100.safetensors", "step-00001000.safetensors"]
    checkpoint = find_checkpoint("auto", tmp_path)
    assert checkpoint is not None
    assert checkpoint.progress == Progress(1000, 0.25, 1000)
    assert dict(checkpoint.state).keys() == STATE.keys()
    assert torch.equal(checkpoint.state["param/head.weight"], STATE["param/head.weight"])
    assert checkpoint.plan.summary() == random_plan(make_vit(), 1).summary()


def test_the_best_one_is_kept_too(tmp_path: Path) -> None:
    mark_best(tmp_path, save(tmp_path, 5))
    for num_steps in (10, 15, 20):
        save(tmp_path, num_steps)
    kept = ["step-00000005.safetensors", "step-00000015.safetensors", "step-00000020.safetensors"]
    assert names(tmp_path) == ["best", "latest", *kept]
    mark_best(tmp_path, save(tmp_path, 25, keep=1))
    save(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["best", "latest", "step-00000025.safetensors", "step-00000030.safetensors"]


def test_what_a_killed_run_had_begun_to_write_goes(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for begun in (".step-00000010.safetensors.abc", ".latest.abc", ".best.abc"):
        (tmp_path / begun).write_bytes(b"half")
    save(tmp_path, 15)
    assert names(tmp_path) == ["latest", "step-00000005.safetensors", "step-00000015.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "with batch_size=16, this one has batch_size=8"),
        ({"seed": 5}, "with seed=4, this one has seed=5"),
        ({"num_train": 99}, "num_train=100"),
        ({"data": {"type": "digits", "seed": 2}}, r"data\.seed=1, this one has data\.seed=2"),
        ({"method": {"type": "spt", "budget": 101}}, r"method\.budget=100, this one has method\.budget=101"),
        ({"method": {"type": "lora"}}, r"method\.type='spt', this one has method\.type='lora'"),
        ({"model": {"name": "vit", "kwargs": {"depth": 3, "dims": (3, 4)}}}, r"model\.kwargs\.depth=2"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 5))
    checkpoint.check(IDENTITY)
    with pytest.raises(UserError, match=message):
        checkpoint.check(replace(IDENTITY, **change))


def test_tuples_of_a_config_are_the_lists_of_its_file(tmp_path: Path) -> None:
    """At any depth: transforms have them, and heads."""
    pipeline = {"train_pipeline": [{"type": "RandomResize", "scale": (192, 96)}]}
    path = save(tmp_path, 5, identity=replace(IDENTITY, data=pipeline))
    load_checkpoint(path).check(replace(IDENTITY, data=pipeline))
    with pytest.raises(UserError, match="train_pipeline"):
        load_checkpoint(path).check(replace(IDENTITY, data={"train_pipeline": [{"scale": (192, 97)}]}))


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 5))
    checkpoint.check_backbone(checkpoint.fingerprint)
    with pytest.raises(UserError, match="backbone with other weights"):
        checkpoint.check_backbone("0" * 64)


def test_another_schedule_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 5))
    checkpoint.check(IDENTITY)
    assert not caplog.messages
    checkpoint.check(replace(IDENTITY, schedule={"train": {"lr": 1e-2}}))
    assert "was written with train.lr=0.001; going on with 0.01" in caplog.text


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path) is None
    assert find_checkpoint(None, tmp_path) is None
    with pytest.raises(UserError, match=r"--resume .*step-1.*no checkpoint file"):
        find_checkpoint(str(tmp_path / "step-1.safetensors"), tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with mounted_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk: Path) -> None:
    good = save(small_disk, 5)
    model = make_vit()
    big = {"param/head.weight": torch.rand(300, 300)}
    with pytest.raises(OSError, match=r"No space left.*step-00000010\.safetensors"):
        save_checkpoint(small_disk, big, inject(model, random_plan(model, 1)), Progress(10), IDENTITY, keep=2)
    found = find_checkpoint("auto", small_disk)
    assert found is not None and found.path == good
    assert names(small_disk) == ["latest", good.name]


def truncate(path: Path) -> None:
    """Keep a part of the file."""
    path.write_bytes(path.read_bytes()[:200])


def cut_end(path: Path) -> None:
    """Lose the last bytes, as a full disk without an error would."""
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    """Change one bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def swap(path: Path) -> None:
    """Put another step's file in its place."""
    path.write_bytes((path.parent / "step-00000005.safetensors").read_bytes())


def make_foreign(path: Path) -> None:
    """Put a plan in its place."""
    random_plan(make_vit(), 1).save(path)


def flip_metadata(path: Path) -> None:
    """Change one letter of what the file says of itself."""
    content = path.read_bytes()
    assert content.count(b"best_score") == 1
    path.write_bytes(content.replace(b"best_score", b"best_scorX"))


def lose_checksums(path: Path) -> None:
    """Change one letter of the key under which they are."""
    path.write_bytes(path.read_bytes().replace(b"crc32", b"crc33"))


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "truncated",
    cut_end: "truncated",
    flip: "damaged",
    flip_metadata: "metadata is not what was written",
    lose_checksums: "has no checksums",
    swap: "after 5 steps; it was swapped",
    make_foreign: "this is a plan file, not a checkpoint",
    Path.unlink: "no checkpoint file",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """One that is asked for is an error; "auto" takes the one before it, and says so."""
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    damage(bad)
    with pytest.raises(UserError, match=rf"{bad.name}.*{DAMAGES[damage]}|{DAMAGES[damage]}.*{bad.name}"):
        find_checkpoint(str(bad), tmp_path)
    found = find_checkpoint("auto", tmp_path)
    assert found is not None and found.path == good
    assert bad.name in caplog.text
    good.write_bytes(b"")
    with pytest.raises(UserError, match=r"no other checkpoint .* is whole"):
        find_checkpoint("auto", tmp_path)


def test_without_a_pointer_the_files_count(tmp_path: Path) -> None:
    """A kill may come between a file and its name's being written."""
    save(tmp_path, 5)
    last = save(tmp_path, 10)
    (tmp_path / "latest").unlink()
    found = find_checkpoint("auto", tmp_path)
    assert found is not None and found.path == last


def test_what_comes_after_a_step_is_dropped(tmp_path: Path) -> None:
    for num_steps in (5, 10, 15):
        path = save(tmp_path, num_steps, keep=9)
    mark_best(tmp_path, path)
    drop_later(tmp_path, 10)
    assert names(tmp_path) == ["latest", "step-00000005.safetensors", "step-00000010.safetensors"]
    save(tmp_path, 12, keep=2)
    assert names(tmp_path) == ["latest", "step-00000010.safetensors", "step-00000012.safetensors"]


def find_on_both(folder: str) -> str:
    """What each rank says."""
    try:
        return str(find_checkpoint("auto", Path(folder)))
    except UserError as error:
        return str(error)


@pytest.mark.distributed
def test_all_ranks_hear_of_a_damaged_file(tmp_path: Path) -> None:
    save(tmp_path, 5).write_bytes(b"")
    first, second = run_ranks(find_on_both, 2, str(tmp_path))
    assert "step-00000005.safetensors" in first
    assert first == second
