"""Tasks that a config names, and who decides how their images are normalised."""

import ast
import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spt_dist import UserError
from spt_dist.data.batches import deal_samples
from spt_dist.data.catalogue import vtab_task
from spt_dist.data.loader import load_batches
from spt_dist.data.samples import SampleSet
from spt_dist.data.shards.convert import convert
from spt_dist.data.shards.sources import source_of_lists
from spt_dist.data.task import Task
from spt_dist.data.tasks import TASKS, build_task, choose_normalisation
from tests.launch.processes import ROOT

GREY = (60, 120, 240)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
RAW = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
OWN = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of one colour in two classes."""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20), GREY).save(tmp_path / split / name / "0.png")
    return tmp_path


def seen(task: Task) -> list[float]:
    """Red, green and blue of the first training image, which is of one colour."""
    assert isinstance(task.train, SampleSet)
    item, _ = task.train.item(0, 0)
    image_CHW = task.train.finish([item], 0, [0])[0]
    assert torch.equal(image_CHW, image_CHW[:, :1, :1].expand_as(image_CHW))
    return image_CHW[:, 0, 0].tolist()


def by_hand(mean: tuple[float, ...], std: tuple[float, ...]) -> list[float]:
    return [(grey / 255 - shift) / scale for grey, shift, scale in zip(GREY, mean, std, strict=True)]


@pytest.mark.parametrize(
    ("data", "model", "wanted", "source"),
    [
        pytest.param({}, None, IMAGENET, "data.transform='vtab'", id="the transform's default"),
        pytest.param({}, "clip", CLIP, "model.normalize", id="the backbone's instead of a default"),
        pytest.param({"transform": "fgvc_paper"}, "clip", CLIP, "model.normalize", id="of random transforms too"),
        pytest.param({}, OWN, tuple(OWN.values()), "model.normalize", id="the backbone's own values"),
        pytest.param(
            {"transform": "vtab_inception"},
            "clip",
            INCEPTION,
            "data.transform='vtab_inception'; model.normalize is clip",
            id="a transform that stands for one before the backbone",
        ),
        pytest.param({"transform": "vtab_raw"}, "clip", RAW, "data.transform='vtab_raw'; model", id="raw"),
        pytest.param({"transform": "vtab_ssf"}, "clip", INCEPTION, "data.transform='vtab_ssf'; model", id="ssf"),
        pytest.param({"transform": "fgvc_ssf"}, "clip", INCEPTION, "data.transform='fgvc_ssf'; model", id="fgvc ssf"),
        pytest.param({"transform": "vtab_vpt"}, "clip", IMAGENET, "data.transform='vtab_vpt'; model", id="vpt"),
        pytest.param(
            {"normalize": "imagenet"},
            "inception",
            IMAGENET,
            "data.normalize; model.normalize is inception",
            id="the data's before the backbone's",
        ),
        pytest.param({"transform": "vtab_raw", "normalize": "clip"}, None, CLIP, "data.normalize", id="before all"),
        pytest.param({"normalize": OWN}, "clip", tuple(OWN.values()), "data.normalize; model", id="the data's values"),
        pytest.param({"normalize": None}, "clip", CLIP, "model.normalize", id="None leaves it to the backbone"),
        pytest.param({"normalize": "clip"}, "clip", CLIP, "data.normalize", id="no word of what agrees"),
    ],
)
def test_who_decides(folder: Path, data: dict[str, Any], model: Any, wanted: tuple[Any, Any], source: str) -> None:
    options = {"type": "image_folder", "root": str(folder), "image_size": 8, "num_workers": 0} | data
    task = build_task(options, 2, model)
    assert seen(task) == pytest.approx(by_hand(*wanted), abs=1e-6)
    found = task.normalisation
    assert found is not None
    assert (list(found.mean), list(found.std)) == ([*wanted[0]], [*wanted[1]])
    assert found.source.startswith(source)
    assert ("model.normalize is" in found.source) == ("; model" in source)


@pytest.mark.parametrize(
    ("options", "model", "wanted"),
    [
        ({"type": "vtab", "task": "cifar"}, None, IMAGENET),
        ({"type": "vtab", "task": "cifar"}, "clip", CLIP),
        ({"type": "vtab", "task": "cifar", "transform": "vtab_raw"}, "clip", RAW),
        ({"type": "fgvc", "data_set": "cub", "normalize": "inception"}, "clip", INCEPTION),
        ({"type": "shards", "train": "train", "val": "val"}, OWN, tuple(OWN.values())),
    ],
)
def test_it_can_be_told_without_the_data(options: dict[str, Any], model: Any, wanted: tuple[Any, Any]) -> None:
    found = choose_normalisation(options | {"root": "nowhere"}, model)
    assert found is not None
    assert (list(found.mean), list(found.std)) == ([*wanted[0]], [*wanted[1]])


def test_on_the_device_too(folder: Path) -> None:
    options = {"type": "image_folder", "root": str(folder), "image_size": 8, "num_workers": 0, "on_device": True}
    assert seen(build_task(options, 2, "clip")) == pytest.approx(by_hand(*CLIP), abs=1e-6)


def test_lists_and_shards(tmp_path: Path) -> None:
    """Of the other kinds of tasks that let it be chosen."""
    root = tmp_path / "vtab" / "kitti"
    root.mkdir(parents=True)
    Image.new("RGB", (20, 20), GREY).save(root / "a.png")
    Image.new("RGB", (20, 20), GREY).save(root / "b.png")
    for split, file in {"train800": "a", "val200": "b", "train800val200": "a", "test": "b"}.items():
        (root / f"{split}.txt").write_text(f"{file}.png 1\n")
    birds = tmp_path / "fgvc" / "cub"
    (birds / "images").mkdir(parents=True)
    for number in range(200):
        Image.new("RGB", (20, 20), GREY).save(birds / "images" / f"{number:03}.png")
    for split in ("train", "val", "test"):
        (birds / f"{split}.json").write_text(json.dumps({f"{number:03}.png": number for number in range(200)}))
    convert(source_of_lists(vtab_task(tmp_path / "vtab", "kitti").read_all()), tmp_path / "shards", num_threads=1)
    kinds: list[tuple[dict[str, Any], int]] = [
        ({"type": "vtab", "root": str(tmp_path / "vtab"), "task": "kitti"}, 4),
        ({"type": "fgvc", "root": str(tmp_path / "fgvc"), "data_set": "cub"}, 200),
        ({"type": "shards", "root": str(tmp_path / "shards"), "train": "train800", "val": "val200"}, 4),
    ]
    for options, num_classes in kinds:
        task = build_task(options | {"image_size": 8, "num_workers": 0}, num_classes, "clip")
        for samples in (task.train, task.val):
            first = deal_samples([0], 1, 0, 1, same_batches=False, epoch=0)
            batch = next(load_batches(samples, first, torch.device("cpu"), num_workers=0))
            assert batch.inputs[0, :, 4, 4].tolist() == pytest.approx(by_hand(*CLIP), abs=1e-6), options["type"]


def test_a_task_that_normalises_by_itself_says_that_the_backbone_s_is_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"type": "digits", "num_train": 10, "num_val": 10}
    with caplog.at_level(logging.WARNING):
        assert build_task(options, 10).normalisation is None
        assert not caplog.records
        assert build_task(options, 10, "clip").normalisation is None
    assert "data.type='digits' normalises images its own way; the backbone wants clip, mean 0.4815" in caplog.text


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"normalize": "imagnet"}, None, r"data\.normalize='imagnet' is unknown"),
        ({"normalize": 3}, None, r"data\.normalize=3 has to be str or dict or None"),
        ({}, "imagnet", r"model\.normalize='imagnet' is unknown"),
        ({"transform": "vtap"}, "clip", r"data\.transform='vtap' is unknown; did you mean 'vtab'"),
    ],
)
def test_mistakes_are_told(folder: Path, data: dict[str, Any], model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task({"type": "image_folder", "root": str(folder)} | data, 2, model)
    with pytest.raises(UserError, match=message):
        choose_normalisation({"type": "image_folder", "root": "nowhere"} | data, model)


def test_nobody_forgets_the_backbone() -> None:
    """A call without it would feed a backbone what it was not trained with, and nothing would tell."""
    calls = [
        (path, node)
        for folder in ("spt_dist", "launch")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "build_task"
    ]
    assert len(calls) >= 4
    for path, call in calls:
        assert [ast.unparse(argument).split(".")[-1] for argument in call.args] == [
            "data",
            "num_classes",
            "normalize",
        ], path


def test_every_task_that_takes_a_transform_lets_it_be_chosen() -> None:
    """But the mini-benchmark, which is drawn for one backbone."""
    parameters = {kind: inspect.signature(build).parameters for kind, build in TASKS.items()}
    assert {kind for kind in parameters if "transform" in parameters[kind]} == {
        *(kind for kind in parameters if "normalize" in parameters[kind]),
        "mini",
    }
