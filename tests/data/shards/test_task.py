"""Shards of real images as a task."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spt_dist import UserError
from spt_dist.data.batches import GlobalBatches
from spt_dist.data.loader import load_batches, order_of
from spt_dist.data.shards.task import build_shards
from tests.data.shards.shards_for_tests import NUM_CLASSES, Files, crc, index_fields, shard_fields, tar_of

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def picture(index: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def files_of(index: int) -> Files:
    buffer = io.BytesIO()
    picture(index).save(buffer, "png")
    return [(f"{index:03d}.png", buffer.getvalue()), (f"{index:03d}.cls", b"%d" % (index % NUM_CLASSES))]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    splits, first = {}, 0
    for split, sizes in (("train", [7, 6]), ("val", [5])):
        shards = []
        for number, size in enumerate(sizes):
            samples = [files_of(index) for index in range(first, first + size)]
            content = tar_of(file for files in samples for file in files)
            (tmp_path / f"{split}-{number}.tar").write_bytes(content)
            shards.append(shard_fields(f"{split}-{number}.tar", content, [crc(files) for files in samples]))
            first += size
        splits[split] = shards
    (tmp_path / "index.json").write_text(json.dumps(index_fields(splits)))
    return tmp_path


def test_a_task_of_shards(root: Path) -> None:
    task = build_shards(str(root), image_size=16, num_workers=0)
    assert (task.num_train, task.num_val, task.num_classes, task.kind) == (13, 5, NUM_CLASSES, "classification")
    for samples, numbers in ((task.train, range(13)), (task.val, range(13, 18))):
        batches = GlobalBatches(len(numbers), 4, seed=1, order=order_of(samples)).epoch()
        met = []
        for batch in load_batches(samples, batches, torch.device("cpu")):
            assert batch.inputs.dtype == torch.float32 and batch.inputs.shape[1:] == (3, 16, 16)
            for image, label, place in zip(batch.inputs, batch.targets.tolist(), batch.samples, strict=True):
                number = numbers[place]
                expected = (np.asarray(picture(number), dtype=np.float64) / 255 - MEAN) / STD
                np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-5)
                assert label == number % NUM_CLASSES
                met.append(number)
        assert sorted(met) == list(numbers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -1}, "config: data.num_workers=-1 has to be 0 or more"),
        ({"lanes": 0}, "config: data.lanes=0 has to be 1 or more"),
        ({"window": 0}, "config: data.window=0 has to be 1 or more"),
        ({"val": "test"}, "index.json: has no samples of a split 'test'; it has train, val"),
    ],
)
def test_mistakes_are_named(root: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_shards(str(root), **options)  # type: ignore[arg-type]


def test_a_missing_shard_is_an_error_at_the_start(root: Path) -> None:
    (root / "val-0.tar").unlink()
    with pytest.raises(UserError, match=r"1 of 1 shards can't be used: .*/val-0.tar: No such file or directory"):
        build_shards(str(root), image_size=16)


def test_shards_of_masks_are_refused(root: Path) -> None:
    index = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps({**index, "kind": "segmentation"}))
    with pytest.raises(UserError, match=r"kind='segmentation', but data.type='shards' is for 'classification'"):
        build_shards(str(root), image_size=16)
