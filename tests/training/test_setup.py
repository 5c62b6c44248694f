"""What is refused before a segmentation run starts."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from spt_dist import UserError
from spt_dist.data.task import Task
from spt_dist.sections import ModelConfig, RunConfig, SensitivityConfig, TrainConfig
from spt_dist.training.pipeline import check_setup
from tests.segmentors_for_tests import NUM_CLASSES, SETTINGS

IMAGES = TensorDataset(torch.zeros(6, 3, 32, 32), torch.zeros(6, 32, 32, dtype=torch.int64))
TASK = Task(IMAGES, IMAGES, 6, 6, NUM_CLASSES)
CONFIG = RunConfig(
    model=ModelConfig(name="mmseg.EncoderDecoder", num_classes=NUM_CLASSES, kwargs=SETTINGS),
    data={"type": "ade20k"},
    method={"type": "lora"},
    train=TrainConfig(iterations=3, batch_size=4),
)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def change(**sections: Any) -> RunConfig:
    """The config with other sections."""
    return replace(CONFIG, **sections)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (change(train=TrainConfig(epochs=3, batch_size=4)), "batch norm.*give train.iterations"),
        (change(train=TrainConfig(iterations=3, batch_size=5, accumulation=2)), "batch_size=5 a multiple of 2"),
        (change(train=TrainConfig(iterations=3, batch_size=7)), "batch_size=7, but the task has 6 training samples"),
        (change(sensitivity=SensitivityConfig(train_mode=True)), "train_mode=True: the head has batch norm"),
        (
            change(
                model=replace(
                    CONFIG.model, kwargs=SETTINGS | {"decode_head": SETTINGS["decode_head"] | {"in_index": 7}}
                )
            ),
            r"does not take the data's images of shape \(3, 32, 32\)",
        ),
    ],
)
def test_what_would_fail_or_mix_samples_later(tmp_path: Path, config: RunConfig, message: str) -> None:
    check_setup(tmp_path, TASK, CONFIG)
    with pytest.raises(UserError, match=message):
        check_setup(tmp_path, TASK, config)


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    save_file({"norm.weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"vit\.safetensors: read as .*keys are missing"):
        check_setup(tmp_path, TASK, change(model=replace(CONFIG.model, checkpoint=str(path))))
