"""The learning rate, against torch's and mmengine's schedulers, and the record of a run."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.optim import PolyLR

from spt_dist import UserError
from spt_dist.sections import TrainConfig
from spt_dist.training.metrics import MetricsFile, read_metrics
from spt_dist.training.schedule import make_schedule


def test_the_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 19, eta_min=0.01)
    schedule = make_schedule(TrainConfig(epochs=4, lr=0.3, min_lr=0.01), 1.0, 5, 20)
    for step in range(20):
        assert schedule.at(step) == pytest.approx(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()


def test_the_power_is_mmengines_for_backbone_and_head() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-3, 1e-2)]
    optimizer = torch.optim.SGD(groups)
    poly = PolyLR(optimizer, eta_min=1e-4, power=0.9, begin=0, end=50, by_epoch=False)
    train = TrainConfig(iterations=50, lr=1e-3, min_lr=1e-4, schedule="poly", poly_power=0.9, head_lr_mult=10)
    schedules = [make_schedule(train, factor, 7, 50) for factor in (1.0, train.head_lr_mult)]
    for step in range(50):
        assert [schedule.at(step) for schedule in schedules] == pytest.approx([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        poly.step()


@pytest.mark.parametrize(
    "train",
    [
        TrainConfig(epochs=5, lr=1.0, min_lr=0.1, warmup_lr=0.2, warmup_epochs=2),
        TrainConfig(iterations=10, lr=1.0, min_lr=0.1, warmup_lr=0.2, warmup_epochs=4, schedule="poly"),
    ],
)
def test_warm_up_is_linear_and_meets_the_peak(train: TrainConfig) -> None:
    schedule = make_schedule(train, 1.0, 2, 10)
    assert [schedule.at(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule.at(9) == pytest.approx(0.1)
    doubled = make_schedule(train, 2.0, 2, 10)
    assert [doubled.at(step) for step in range(5)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert doubled.at(9) == pytest.approx(0.1)


def test_a_resumed_record_repeats_nothing_and_survives_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (1, 2, 3):
        metrics.write(step=step, loss=1.0 / step)
    metrics.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')
    resumed = MetricsFile(path, 2)
    resumed.write(step=3, loss=9.0)
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    path.write_text("no json\n" + json.dumps({"step": 1}) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        read_metrics(path)
