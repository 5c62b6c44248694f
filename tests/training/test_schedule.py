"""The learning rate, and the record of a run."""

import json
from pathlib import Path

import pytest
import torch

from spt_dist import UserError
from spt_dist.training.metrics import MetricsFile, read_metrics
from spt_dist.training.schedule import CosineSchedule


def test_the_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 19, eta_min=0.01)
    schedule = CosineSchedule(0.3, 0.01, 0.0, 0, 20)
    for step in range(20):
        assert schedule.at(step) == pytest.approx(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()


def test_warm_up_is_linear_and_meets_the_peak() -> None:
    schedule = CosineSchedule(1.0, 0.1, 0.2, 4, 10)
    assert [schedule.at(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule.at(9) == pytest.approx(0.1)


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
