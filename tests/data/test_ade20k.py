"""ADE20K as a task: mmseg's own pipelines as witnesses, and files that are not what they should be.

Shape suffixes: C channels, H rows, W columns.
"""

import logging
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from spt_dist.data.ade20k import build_ade20k
from spt_dist.data.batches import GlobalBatches
from spt_dist.data.loader import load_batches
from spt_dist.data.scenes import make_scenes
from spt_dist.data.task import SEGMENTATION, Task
from spt_dist.data.tasks import build_task
from spt_dist.errors import UserError
from tests.ranks import run_ranks

pytestmark = [pytest.mark.segmentation, pytest.mark.filterwarnings("ignore::UserWarning:mm")]

NUM_TRAIN, NUM_VAL = 7, 3
CROP, SCALE = (40, 56), (160, 48)
MEAN, STD = (120.5, 110.0, 100.0), (60.0, 50.5, 40.0)
# What loads the files; no crop follows, so the crop size has to hold the whole image.
LOADING = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
WHOLE = (80, 80)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, to be read only."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "root", NUM_TRAIN, NUM_VAL, size=48, show_progress=False)


@pytest.fixture
def root(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes, to be damaged."""
    return shutil.copytree(scenes, tmp_path / "root")


def build(root: Path, **options: Any) -> Task:
    """A task with small crops and numbers that tell the channels apart."""
    arguments: dict[str, Any] = {"crop_size": CROP, "scale": SCALE, "mean": MEAN, "std": STD, "num_workers": 0}
    return build_ade20k(str(root), **arguments | options)


def mmseg_sample(
    root: Path, split: str, pipeline: list[dict[str, Any]], index: int, crop: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """An item by mmseg's data set and its preprocessor: normalised image and label."""
    from mmengine.registry import DefaultScope
    from mmseg.datasets import ADE20KDataset
    from mmseg.models import SegDataPreProcessor

    prefix = {"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"}
    with DefaultScope.overwrite_default_scope("mmseg"):
        packed = ADE20KDataset(data_root=str(root), data_prefix=prefix, pipeline=pipeline, serialize_data=False)[index]
    prepare = SegDataPreProcessor(mean=MEAN, std=STD, bgr_to_rgb=True, size=crop, pad_val=0, seg_pad_val=255)
    batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
    done = prepare(batch, training=crop is not None)
    return done["inputs"][0], done["data_samples"][0].gt_sem_seg.data[0]


def published(split: str) -> list[dict[str, Any]]:
    """The pipeline of mmseg's own config file, with the tests' sizes."""
    import mmseg
    from mmengine.config import Config

    path = Path(mmseg.__path__[0], ".mim/configs/_base_/datasets/ade20k.py")
    config = Config.fromfile(path, use_predefined_variables=False).to_dict()
    steps: list[dict[str, Any]] = config[f"{split}_pipeline"]
    for step in steps:
        step |= {"crop_size": CROP} if "crop_size" in step else {}
        step |= {"scale": SCALE} if "scale" in step else {}
    return steps


def seed_as_documented(seed: int, epoch: int, index: int) -> None:
    np.random.seed(np.random.SeedSequence((seed, epoch, index)).generate_state(4))


def test_training_samples_are_those_of_mmseg(scenes: Path) -> None:
    train = build(scenes, seed=5).train
    padded = []
    for epoch, index in product((0, 2), range(NUM_TRAIN)):
        image_CHW, label_HW = train.item(epoch, index)
        seed_as_documented(5, epoch, index)
        wanted_CHW, wanted_HW = mmseg_sample(scenes, "training", published("train"), index, CROP)
        assert torch.equal(image_CHW, wanted_CHW)
        assert torch.equal(label_HW, wanted_HW)
        assert (image_CHW.dtype, label_HW.dtype) == (torch.float32, torch.int64)
        assert (image_CHW.shape, label_HW.shape) == ((3, *CROP), CROP)
        outside_HW = (image_CHW == 0).all(dim=0)
        padded.append(bool(outside_HW[-1].all()))
        assert (label_HW[outside_HW] == 255).all()
    assert set(padded) == {False, True}, "some images have to be smaller than a crop, some larger"


def test_views_are_those_of_mmseg_and_labels_the_files_own(scenes: Path) -> None:
    task = build(scenes)
    views = task.val.views((1.0, 0.5, 1.75))
    assert len(views) == NUM_VAL
    for index in range(NUM_VAL):
        images, label_HW = views[index]
        for image_CHW, scale in zip(images, (SCALE, (80, 24), (280, 84)), strict=True):
            pipeline = [step | ({"scale": scale} if "scale" in step else {}) for step in published("test")]
            wanted_CHW, wanted_HW = mmseg_sample(scenes, "validation", pipeline, index, None)
            assert torch.equal(image_CHW, wanted_CHW)
            assert torch.equal(label_HW, wanted_HW)
        raw_HW = np.asarray(Image.open(task.val.paths(index)[1])).astype(np.int64)
        assert np.array_equal(label_HW, np.where(raw_HW == 0, 255, raw_HW - 1))
        assert label_HW.dtype == torch.int64


def test_set_describes_itself(scenes: Path) -> None:
    task = build(scenes, num_workers=3)
    assert (task.num_train, task.num_val, task.num_classes) == (NUM_TRAIN, NUM_VAL, 150)
    assert (task.kind, task.train.num_workers) == (SEGMENTATION, 3)
    assert (task.train.classes[0], task.train.classes[149], len(task.train.classes)) == ("wall", "flag", 150)
    assert (task.train.palette[2], len(task.train.palette)) == ([6, 230, 230], 150)
    image, mask = task.val.paths(1)
    assert image == str(scenes / "images/validation/ADE_val_00000002.jpg")
    assert mask == str(scenes / "annotations/validation/ADE_val_00000002.png")
    picture_HWC = task.val.picture(1)
    assert picture_HWC.dtype == np.uint8
    # Two decoders, which round differently; red and blue are far apart.
    wanted_HWC = np.asarray(Image.open(image)).astype(int)
    assert np.abs(picture_HWC - wanted_HWC).max() <= 3
    assert np.abs(wanted_HWC - wanted_HWC[..., ::-1]).max() > 50


def test_flip_moves_image_and_label(scenes: Path) -> None:
    flip = {"type": "RandomFlip", "prob": 1.0, "direction": "horizontal"}
    plain = build(scenes, crop_size=WHOLE, train_pipeline=LOADING).train
    flipped = build(scenes, crop_size=WHOLE, train_pipeline=[*LOADING, flip]).train
    for index in range(3):
        height, width = plain.picture(index).shape[:2]
        for whole, mirrored in zip(plain.item(0, index), flipped.item(0, index), strict=True):
            inner, inner_mirrored = whole[..., :height, :width], mirrored[..., :height, :width]
            assert torch.equal(inner.flip(-1), inner_mirrored)
            assert not torch.equal(inner, inner_mirrored)


def test_default_pipeline_draws_both_flips(scenes: Path) -> None:
    """And so do other draws differ: no two of many epochs have the same crop."""
    train = build(scenes).train
    crops = {train.item(epoch, 0)[0].numpy().tobytes() for epoch in range(12)}
    assert len(crops) == 12


def test_item_depends_on_seed_epoch_and_index_alone(scenes: Path) -> None:
    train = build(scenes).train
    wanted = [train.item(3, index) for index in range(NUM_TRAIN)]
    np.random.seed(99)
    random.seed(99)
    again = build(scenes).train
    train.item(1, 0)
    assert all(same(again.item(3, index), wanted[index]) for index in reversed(range(NUM_TRAIN)))
    others = [train.item(4, 0), build(scenes, seed=1).train.item(3, 0), train.item(0, 3)]
    assert not any(same(other, wanted[0]) for other in others)


@pytest.mark.parametrize("fails", [False, True])
def test_random_state_of_the_process_is_left_alone(root: Path, fails: bool) -> None:
    # Of mmcv's transforms one draws from Python's own generator.
    grey = {"type": "RandomGrayscale", "prob": 0.5, "keep_channels": True}
    train = build(root, crop_size=WHOLE, train_pipeline=[*LOADING, grey]).train
    if fails:
        Path(build(root).train.paths(0)[0]).write_bytes(b"no image")
    before = np.random.get_state(), random.getstate(), torch.get_rng_state()
    try:
        train.item(0, 0)
        assert not fails
    except UserError:
        assert fails
    after = np.random.get_state(), random.getstate(), torch.get_rng_state()
    assert all(np.array_equal(old, new) for old, new in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])


def test_python_s_own_random_numbers_follow_from_the_index_too(scenes: Path) -> None:
    grey = {"type": "RandomGrayscale", "prob": 0.5, "keep_channels": True}

    def is_grey(epoch: int) -> bool:
        train = build(scenes, crop_size=WHOLE, train_pipeline=[*LOADING, grey], mean=(0, 0, 0), std=(1, 1, 1)).train
        image_CHW = train.item(epoch, 0)[0]
        return bool((image_CHW[0] == image_CHW[1]).all())

    random.seed(0)
    first = [is_grey(epoch) for epoch in range(12)]
    random.seed(7)
    assert [is_grey(epoch) for epoch in range(12)] == first
    assert 0 < sum(first) < 12


def test_ranks_and_workers_make_the_same_samples(scenes: Path) -> None:
    cpu = torch.device("cpu")
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for world_size, num_workers in ((1, 0), (2, 2)):
        for rank in range(world_size):
            batches = GlobalBatches(NUM_TRAIN, 4, rank, world_size, seed=0).epoch()
            for batch in load_batches(build(scenes, num_workers=num_workers).train, batches, cpu):
                for place, index in enumerate(batch.samples):
                    seen.setdefault(index, []).append((batch.inputs[place], batch.targets[place]))
    assert sorted(seen) == list(range(NUM_TRAIN))
    samples = build(scenes).train
    assert all(same(copy, samples.item(0, index)) for index, copies in seen.items() for copy in copies)


def test_sets_can_be_pickled(scenes: Path) -> None:
    """Workers that are spawned get them so."""
    task = build(scenes)
    crops, views = pickle.loads(pickle.dumps((task.train, task.val.views([0.5]))))
    assert same(crops.item(2, 1), task.train.item(2, 1))
    assert torch.equal(views[0][0][0], task.val.views([0.5])[0][0][0])


def test_own_pipeline_may_end_as_mmseg_s_do(scenes: Path) -> None:
    """Its packing is left out, and `reduce_zero_label` in it is what holds anyway."""
    own = build(scenes, train_pipeline=published("train")).train
    assert same(own.item(0, 0), build(scenes).train.item(0, 0))


def test_config_section_is_checked(scenes: Path) -> None:
    options = {"type": "ade20k", "root": str(scenes), "crop_size": [40, 56], "mean": [1, 2.5, 3]}
    assert build_task(options, 150).num_train == NUM_TRAIN
    for wrong, message in (
        ({"crop_size": 40}, r"data\.crop_size=40 has to be Sequence"),
        ({"roots": "x"}, r"data\.roots is unknown; did you mean 'root'"),
        ({"num_workers": 1.5}, r"data\.num_workers=1\.5 has to be int"),
    ):
        with pytest.raises(UserError, match=message):
            build_task(options | wrong, 150)
    with pytest.raises(UserError, match=r"model\.num_classes=10, but data\.type='ade20k' has 150"):
        build_task(options, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": (40,)}, r"data\.crop_size=\(40,\) has to be two integers above 0"),
        ({"crop_size": "40"}, r"data\.crop_size='40' has to be two integers"),
        ({"crop_size": (40, 0)}, r"data\.crop_size=\(40, 0\)"),
        ({"scale": (160.0, 48)}, r"data\.scale=\(160\.0, 48\)"),
        ({"mean": (1, 2)}, r"data\.mean=\(1, 2\) has to be three numbers$"),
        ({"std": (1, 0, 1)}, r"data\.std=\(1, 0, 1\) has to be three numbers above 0"),
        ({"std": (1, float("nan"), 1)}, r"data\.std"),
        ({"mean": "abc"}, r"data\.mean='abc'"),
        ({"num_workers": -1}, r"data\.num_workers=-1"),
        ({"seed": -1}, r"data\.seed=-1"),
        ({"train_pipeline": [*LOADING, {"type": "RandomCorp"}]}, r"data\.train_pipeline\[2\]=.*RandomCorp"),
        ({"train_pipeline": [{"type": "RandomCrop"}]}, r"data\.train_pipeline\[0\]=.*crop_size"),
        ({"train_pipeline": ["RandomCrop"]}, r"data\.train_pipeline\[0\]='RandomCrop' has to be a dict"),
    ],
)
def test_arguments_out_of_range(scenes: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(scenes, **options)


def test_pipeline_without_crop(scenes: Path) -> None:
    with pytest.raises(
        UserError, match=r"train_pipeline leaves \(\d+, \d+\) pixels of .*0001\.jpg.*\(20, 20\).*RandomC"
    ):
        build(scenes, crop_size=(20, 20), train_pipeline=LOADING).train.item(0, 0)


def test_extra_is_missing(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmseg.datasets", None)
    with pytest.raises(UserError, match=r"data\.type='ade20k' needs mmseg.*pip install 'spt_dist\[segmentation\]'"):
        build(scenes)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("", r"root: no such folder; .*--make-scenes"),
        ("images/validation", r"images/validation: no such folder"),
        ("annotations/training", r"annotations/training: no such folder"),
        ("images/training/*", r"images/training: has no \.jpg files"),
        (
            "images/training/ADE_train_00000003.jpg",
            r"annotations/training/ADE_train_00000003\.png: has no image; .*--skip-bad-samples",
        ),
        ("annotations/validation/*1.png", r"images/validation/ADE_val_00000001\.jpg: has no mask; mend it"),
        ("annotations/validation/*", r"images/validation/ADE_val_00000001\.jpg \(and 2 more\): has no mask; mend it"),
    ],
)
def test_missing_files(root: Path, missing: str, message: str) -> None:
    if not missing:
        shutil.rmtree(root)
    elif (root / missing).is_dir():
        shutil.rmtree(root / missing)
    else:
        for path in list(root.glob(missing)):
            path.unlink()
    with pytest.raises(UserError, match=message):
        build(root)


def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def keep(share: float) -> Callable[[Path], None]:
    """Cuts a file off, as an interrupted download does."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def zero_second_half(path: Path) -> None:
    """As a download into a file that was made in full length."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def lose_end_behind_a_preview(path: Path) -> None:
    """A cut-off file whose embedded preview has an end of its own."""
    preview, whole = BytesIO(), BytesIO()
    with Image.open(path) as image:
        image.resize((16, 16)).save(preview, "JPEG")
        image.save(whole, "JPEG")
    segment = b"Exif\0\0" + preview.getvalue()
    content = whole.getvalue()
    content = content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + content[2:]
    assert content.count(b"\xff\xd9") == 2
    path.write_bytes(content[:-100])


def turn(path: Path) -> None:
    """The image lies on its side, and says so; decoders set it upright, which the mask is not."""
    with Image.open(path) as image:
        image.load()
    exif = Image.Exif()
    exif[274] = 6
    image.save(path, exif=exif)


def overwrite_with(content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def remask(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)

    return damage


def set_corner(value: int) -> Callable[[Path], None]:
    def change(mask_HW: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        mask_HW = mask_HW.copy()
        mask_HW[0, -1] = value
        return mask_HW

    return remask(change)


HOLLOW_JPEG = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xd9"
# Which file is damaged, how, and what is said of it.
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "image cut off": ("jpg", keep(0.6), "its end is missing"),
    "image without its last bytes": ("jpg", keep(0.999), "its end is missing"),
    "image half zeros": ("jpg", zero_second_half, "its end is missing"),
    "image cut off behind a preview": ("jpg", lose_end_behind_a_preview, "its end is missing"),
    "image empty": ("jpg", keep(0), "is empty"),
    "image is text": ("jpg", overwrite_with(b"<html>404</html>"), r"can't be decoded"),
    "image hollow": ("jpg", overwrite_with(HOLLOW_JPEG), "can't be decoded"),
    "image turned": ("jpg", turn, r"annotations.* pixels, but its image"),
    "mask cut off": ("png", keep(0.6), r"can't be decoded \(.*truncated"),
    "mask empty": ("png", keep(0), "is empty"),
    "mask is text": ("png", overwrite_with(b"<html>404</html>"), "can't be decoded"),
    "mask smaller": ("png", remask(lambda mask: mask[1:]), r"has \d+ x \d+ pixels, but its image .*0002\.jpg has"),
    "mask turned": ("png", remask(lambda mask: mask.T), "pixels, but its image"),
    "mask in colour": ("png", remask(lambda mask: np.stack([mask] * 3, axis=-1)), "mode 'RGB'; a mask has one channel"),
    "mask of 16 bits": ("png", remask(lambda mask: mask.astype(np.uint16) + 256), "mode 'I;16'"),
    "mask of one bit": ("png", remask(lambda mask: mask > 3), "mode '1'"),
    "mask has 151": ("png", set_corner(151), "has the value 151; a mask's values are 0 to 150"),
    "mask has 255": ("png", set_corner(255), "has the value 255"),
}


def damage(root: Path, case: str, split: str = "training", number: int = 2) -> Path:
    """Damage one file and return it."""
    suffix, harm, _ = DAMAGES[case]
    folder, prefix = ("images" if suffix == "jpg" else "annotations"), {"training": "train"}.get(split, "val")
    path = root / folder / split / f"ADE_{prefix}_{number:08d}.{suffix}"
    harm(path)
    return path


@pytest.mark.parametrize("case", DAMAGES)
def test_bad_sample_is_named_where_it_is_read(root: Path, case: str) -> None:
    path = damage(root, case)
    task = build(root)
    with pytest.raises(UserError, match=DAMAGES[case][2]) as crop:
        task.train.item(0, 1)
    with pytest.raises(UserError, match=DAMAGES[case][2]) as view:
        task.train.views([1.0])[1]
    for error in (crop, view):
        assert str(path) in str(error.value)
        assert f"(--skip-bad-samples); `python launch/prepare_data.py ade20k --check {root}`" in str(error.value)
        assert "\n" not in str(error.value)
    # The others are there.
    assert task.train.item(0, 0)[0].shape == (3, *CROP)


@pytest.mark.parametrize("case", DAMAGES)
def test_bad_sample_is_left_out(root: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    path = damage(root, case)
    with caplog.at_level(logging.WARNING, "spt_dist"):
        task = build(root, skip_bad_samples=True)
    assert (task.num_train, task.num_val, len(task.train)) == (NUM_TRAIN - 1, NUM_VAL, NUM_TRAIN - 1)
    kept = [task.train.paths(index)[0][-5:] for index in range(len(task.train))]
    assert kept == ["1.jpg", "3.jpg", "4.jpg", "5.jpg", "6.jpg", "7.jpg"]
    assert [task.train.item(0, index)[0].shape for index in range(len(kept))] == [(3, *CROP)] * len(kept)
    (record,) = caplog.records
    assert "1 bad training samples are left out, 6 remain" in record.getMessage()
    assert str(path) in record.getMessage()


def test_error_of_a_worker_names_the_file(root: Path) -> None:
    path = damage(root, "mask has 151")
    batches = GlobalBatches(NUM_TRAIN, 4, seed=0).epoch()
    with pytest.raises(UserError, match=str(path)):
        list(load_batches(build(root, num_workers=1).train, batches, torch.device("cpu")))


def test_good_though_unusual_files_are_taken(root: Path) -> None:
    images = sorted((root / "images/training").iterdir())
    mask = root / "annotations/training/ADE_train_00000001.png"
    wanted = [build(root).train.item(0, index)[1] for index in range(5)]
    indexed = Image.open(mask)
    indexed.load()
    indexed.putpalette([5, 6, 7] * 256)
    assert indexed.mode == "P"
    indexed.save(mask)
    images[0].write_bytes(images[0].read_bytes() + b"\0 bytes behind the end\xff")
    for path, options in (
        (images[1], {"format": "PNG"}),
        (images[2], {"format": "JPEG", "progressive": True}),
        (images[3], {"format": "JPEG", "restart_marker_blocks": 1}),
    ):
        with Image.open(path) as image:
            image.load()
        image.save(path, **options)
    with Image.open(images[4]) as image:
        image.convert("L").save(images[4])
    task = build(root, skip_bad_samples=True)
    assert task.num_train == NUM_TRAIN
    assert all(torch.equal(task.train.item(0, index)[1], wanted[index]) for index in range(5))


@pytest.mark.parametrize("progressive", [False, True])
def test_end_of_a_jpeg(progressive: bool) -> None:
    """Wherever it is cut, it is seen; Pillow as witness, which refuses what it can't finish."""
    from spt_dist.data.pairs import _has_jpeg_end

    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=98, progressive=progressive, restart_marker_blocks=2)
    content = buffer.getvalue()
    assert _has_jpeg_end(content)
    assert _has_jpeg_end(content + bytes(7))
    refused = 0
    for length in range(2, len(content)):
        assert not _has_jpeg_end(content[:length])
        assert not _has_jpeg_end(content[:length] + bytes(len(content) - length))
        try:
            Image.open(BytesIO(content[:length])).load()
        except OSError:
            refused += 1
    assert refused > 0.9 * len(content)


def kept_files(root: str) -> tuple[list[str], list[str], list[str]]:
    """What this rank keeps of training and validation, and its warnings."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger("spt_dist").addHandler(Collect())
    task = build(Path(root), skip_bad_samples=True, num_workers=2)
    return *([part.paths(index)[0] for index in range(len(part))] for part in (task.train, task.val)), lines


@pytest.mark.distributed
def test_all_ranks_leave_out_the_same(root: Path) -> None:
    """Bad files in the shares of both ranks, which are uneven; also an image alone and a mask alone."""
    damage(root, "image cut off", number=1)
    damage(root, "mask has 255", number=4)
    damage(root, "mask in colour", "validation", 3)
    (root / "annotations/training/ADE_train_00000006.png").unlink()
    (root / "images/training/ADE_train_00000007.jpg").unlink()
    results = run_ranks(kept_files, 2, str(root))
    wanted_train = [str(root / f"images/training/ADE_train_0000000{number}.jpg") for number in (2, 3, 5)]
    wanted_val = [str(root / f"images/validation/ADE_val_0000000{number}.jpg") for number in (1, 2)]
    assert [(train, val) for train, val, _ in results] == [(wanted_train, wanted_val)] * 2
    first, second = results[0][2]
    assert first.startswith("4 bad training samples are left out, 3 remain:\n")
    assert "0001.jpg: its end is missing" in first
    assert "0004.png: has the value 255" in first
    assert "0006.png: can't be read (No such file or directory)" in first
    assert first.endswith("... and 1 more")
    assert second.startswith("1 bad validation samples are left out, 2 remain:\n")
    assert results[1][2] == [], "one rank says it for all"


def test_none_is_good(root: Path) -> None:
    for number in range(1, NUM_VAL + 1):
        damage(root, "mask empty", "validation", number)
    with pytest.raises(UserError, match=r"none of the 3 validation samples is good; the first: .*0001\.png: is empty"):
        build(root, skip_bad_samples=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(root: Path) -> None:
    path = root / "images/training/ADE_train_00000001.jpg"
    path.chmod(0)
    with pytest.raises(UserError, match=r"0001\.jpg: can't be read \(Permission denied\)"):
        build(root).train.item(0, 0)
