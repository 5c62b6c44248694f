"""A run says once how its images are normalised, in the log and in its record."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spt_dist.sections import EngineConfig, ModelConfig, RunConfig, TrainConfig
from spt_dist.training.pipeline import run_training
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def make_config(root: Path, normalize: str | None) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="vit_tiny_patch16_224", num_classes=2, kwargs=VIT, normalize=normalize),
        data={"type": "image_folder", "root": str(root), "image_size": 16, "num_workers": 0},
        method={"type": "linear"},
        engine=EngineConfig(type="ddp"),
        train=TrainConfig(epochs=1, batch_size=4, warmup_epochs=0),
        work_dir=str(root / f"run_{normalize}"),
    )


def train(configs: list[RunConfig]) -> list[str]:
    """What the runs log about it."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("spt_dist").addHandler(handler)
    logging.getLogger("spt_dist").setLevel(logging.INFO)
    for config in configs:
        run_training(config, "config.py")
    return [message for message in messages if "normalised" in message]


def read_record(config: RunConfig) -> Any:
    return json.loads((Path(config.work_dir) / "run.json").read_text())["normalisation"]


def test_log_and_record(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            for image in range(2):
                Image.new("RGB", (20, 20), (90 * number, 9 * image, 200)).save(tmp_path / split / name / f"{image}.png")
    configs = [make_config(tmp_path, "clip"), make_config(tmp_path, None)]
    digits = replace(configs[1], data={"type": "digits", "image_size": 16, "num_train": 8, "num_val": 8})
    digits = replace(digits, model=replace(digits.model, num_classes=10), work_dir=str(tmp_path / "digits"))
    (messages,) = run_ranks(train, 1, [*configs, digits])
    assert messages == [
        "images are normalised as clip, mean 0.4815 0.4578 0.4082, deviation 0.2686 0.2613 0.2758 (model.normalize)",
        "images are normalised as imagenet, mean 0.485 0.456 0.406, deviation 0.229 0.224 0.225 "
        "(data.transform='vtab')",
    ]
    assert read_record(configs[0]) == {
        "name": "clip",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "source": "model.normalize",
    }
    assert read_record(configs[1])["name"] == "imagenet"
    assert read_record(digits) is None
