"""ADE20K from shards: the same samples and the same mIoU as from files."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("mmseg")
from spt_dist.data.ade20k import build_ade20k
from spt_dist.data.batches import GlobalBatches, epoch_key
from spt_dist.data.loader import load_batches, load_items, order_of
from spt_dist.data.samples import BadSampleError
from spt_dist.data.scenes import make_scenes
from spt_dist.data.shards.convert import convert
from spt_dist.data.shards.sources import source_of_ade20k
from spt_dist.data.task import Task
from spt_dist.errors import UserError
from spt_dist.evaluation.segmentation import evaluate_miou
from tests.evaluation.segmentation_for_tests import TinyNet
from tests.ranks import run_ranks

pytestmark = [pytest.mark.segmentation, pytest.mark.filterwarnings("ignore::UserWarning:mm")]

NUM_TRAIN, NUM_VAL = 11, 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scenes as files, and the same in shards of three."""
    folder = tmp_path_factory.mktemp("scenes")
    root = make_scenes(folder / "root", NUM_TRAIN, NUM_VAL, size=48, show_progress=False)
    convert(source_of_ade20k(root), folder / "shards", num_threads=1, shard_size=3, show_progress=False)
    return root, folder / "shards"


def build(root: Path | str, **options: Any) -> Task:
    return build_ade20k(str(root), **{"crop_size": (40, 56), "scale": (160, 48), "num_workers": 0} | options)


def test_held_out_samples_are_those_of_the_files(folders: tuple[Path, Path]) -> None:
    files, shards = (build(root).val for root in folders)
    assert (len(shards), shards.classes, shards.palette) == (NUM_VAL, files.classes, files.palette)
    for wanted, found in zip(
        load_items(files.views([1.0, 0.5]), range(NUM_VAL)),
        load_items(shards.views([1.0, 0.5]), range(NUM_VAL)),
        strict=True,
    ):
        assert not isinstance(wanted, BadSampleError)
        assert not isinstance(found, BadSampleError)
        assert all(torch.equal(own, other) for own, other in zip(wanted[0], found[0], strict=True))
        assert torch.equal(wanted[1], found[1])
    assert np.array_equal(files.picture(3), shards.picture(3))
    assert len({shards.label(index) for index in range(NUM_VAL)}) == NUM_VAL


def test_crops_are_those_of_the_files(folders: tuple[Path, Path]) -> None:
    # The held-out ones, since these are in the order of the files.
    files, shards = (build(root).val for root in folders)
    for epoch in (0, 9):
        for index, found in enumerate(shards.stream(epoch, range(NUM_VAL))):
            image_CHW, label_HW = files.item(epoch, index)
            assert torch.equal(found[0], image_CHW)
            assert torch.equal(found[1], label_HW)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_training_sample_comes_once_in_an_epoch(folders: tuple[Path, Path], num_workers: int) -> None:
    wanted = sorted(label_HW.numpy().tobytes() for label_HW in all_labels(build(folders[0])))
    task = build(folders[1], num_workers=num_workers)
    batches = GlobalBatches(NUM_TRAIN, 4, seed=2, order=order_of(task.train))
    seen: list[int] = []
    images = []
    for batch in load_batches(task.train, batches.epoch(), CPU):
        assert batch.inputs.shape[1:] == (3, 40, 56)
        seen += batch.samples
        images.append(batch.inputs)
    assert sorted(seen) == list(range(NUM_TRAIN))
    assert len(torch.cat(images).unique(dim=0)) == NUM_TRAIN
    again = sorted(label_HW.numpy().tobytes() for label_HW in all_labels(task))
    assert again == wanted


def all_labels(task: Task) -> list[Tensor]:
    """Of the training images, whole."""
    items = load_items(task.train.views([1.0]), range(NUM_TRAIN))  # type: ignore[union-attr]
    return [item[1] for item in items if not isinstance(item, BadSampleError)]


def miou(root: str, options: dict[str, Any]) -> dict[str, float]:
    """On this rank, with a net that gives something else for each image."""
    net = TinyNet({"mode": "whole"}, num_classes=150)
    return evaluate_miou(net, net, build(root, **options), CPU)


@pytest.mark.distributed
def test_miou_is_that_of_the_files_on_any_number_of_ranks(folders: tuple[Path, Path]) -> None:
    wanted = miou(str(folders[0]), {})
    assert miou(str(folders[1]), {"num_workers": 2}) == wanted
    assert run_ranks(miou, 2, str(folders[1]), {}) == [wanted, wanted]


def test_a_bad_sample_ends_the_run_or_is_left_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for path in folders[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = next(path for path in sorted(tmp_path.glob("val-*.tar")))
    content = bytearray(shard.read_bytes())
    # Within the first image.
    content[700] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"{shard}.*sample 0 of 2"):
        list(load_items(build(tmp_path).val.views([1.0]), range(NUM_VAL)))
    kept = list(load_items(build(tmp_path, skip_bad_samples=True).val.views([1.0]), range(NUM_VAL)))
    assert [isinstance(item, BadSampleError) for item in kept] == [True] + [False] * (NUM_VAL - 1)
    net = TinyNet({"mode": "whole"}, num_classes=150)
    shares = evaluate_miou(net, net, build(tmp_path, skip_bad_samples=True), CPU)
    assert 0 <= shares["aAcc"] <= 1


def test_files_in_memory_are_gone_afterwards(folders: tuple[Path, Path]) -> None:
    shards = build(folders[1]).val
    before = files_in_memory()
    assert len(list(shards.stream(epoch_key(0, 0), range(NUM_VAL)))) == NUM_VAL
    assert files_in_memory() == before


def files_in_memory() -> list[str]:
    """Those that this process has open; of others, what earlier tests left may be closed at any time."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        # The listing's own is closed by now.
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(link for link in links if link.startswith("/memfd:"))


def test_shards_of_another_task_are_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(
        '{"format": "spt_dist.shards", "version": 1, "kind": "classification", "classes": ["a"], "splits": {}}'
    )
    with pytest.raises(UserError, match=r"index\.json"):
        build(tmp_path)
