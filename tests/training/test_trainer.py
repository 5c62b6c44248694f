"""What the trainer does at the end of an epoch, when it is stopped there, and with the best checkpoint."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spt_dist.normalisation import read_normalisation
from spt_dist.parallel.checkpoints import Checkpoint, find_checkpoint
from spt_dist.parallel.signals import Stopped, StopSignals
from spt_dist.training.metrics import read_metrics
from spt_dist.training.trainer import Trainer, run_identity
from tests.parallel.test_engines import CPU, DDP, make_config, make_engine, make_task

# 22 samples in batches of 8.
STEPS_PER_EPOCH = 3
OPTIONS: dict[str, Any] = {"epochs": 4, "eval_interval": 1, "checkpoint_interval": 1, "save_best": True}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Rehearsed(Trainer):
    """With given accuracies, one for each epoch, and told to stop before a certain step."""

    accuracies: tuple[float, ...] = ()
    stop_before: int | None = None

    def evaluate(self) -> dict[str, float]:
        """The epoch's accuracy."""
        return {"top1": self.accuracies[self.progress.num_steps // STEPS_PER_EPOCH - 1]}

    def train_step(self, *arguments: Any) -> tuple[float, float, bool]:
        """A real step."""
        if self.progress.num_steps == self.stop_before:
            signal.raise_signal(signal.SIGUSR1)
        return super().train_step(*arguments)


def run(folder: Path, accuracies: tuple[float, ...], stop_before: int | None = None, **options: Any) -> Rehearsed:
    """Train, or go on, in ``folder``."""
    with StopSignals() as stop:
        trainer = Rehearsed(
            make_engine(DDP), make_task(), make_config(DDP, str(folder), **(OPTIONS | options)), CPU, stop=stop
        )
        trainer.accuracies, trainer.stop_before = accuracies, stop_before
        checkpoint = find_checkpoint("auto", folder / "checkpoints")
        if checkpoint is not None:
            trainer.resume(checkpoint)
        trainer.fit()
    return trainer


def latest(folder: Path) -> Checkpoint:
    """The last checkpoint."""
    found = find_checkpoint("auto", folder / "checkpoints")
    assert found is not None
    return found


def test_the_best_of_all_evaluations_is_kept(tmp_path: Path) -> None:
    trainer = run(tmp_path, (0.2, 0.9, 0.5, 0.9))
    assert (trainer.progress.best_score, trainer.progress.best_step) == (0.9, 6)
    assert latest(tmp_path).progress == trainer.progress
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000006.safetensors"
    assert (tmp_path / "checkpoints" / "step-00000006.safetensors").is_file()
    assert (tmp_path / "task_best.safetensors").is_file()


@pytest.mark.parametrize("stop_before", [4, 5, 6, 11])
@pytest.mark.parametrize("checkpoint_steps", [None, 1, 3])
def test_stopped_anywhere_no_evaluation_is_lost(tmp_path: Path, stop_before: int, checkpoint_steps: int | None) -> None:
    """Also not behind the last step of an epoch, nor of the run."""
    accuracies = (0.2, 0.9, 0.5, 0.6)
    run(tmp_path / "whole", accuracies, checkpoint_steps=checkpoint_steps)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "stopped", accuracies, stop_before, checkpoint_steps=checkpoint_steps)
    assert stopped.value.step == stop_before + 1
    assert latest(tmp_path / "stopped").progress.num_steps == stop_before + 1
    run(tmp_path / "stopped", accuracies, checkpoint_steps=checkpoint_steps)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped")]
    assert lines[0] == lines[1]
    assert [line["top1"] for line in lines[1] if "top1" in line] == list(accuracies)
    assert latest(tmp_path / "stopped").progress == latest(tmp_path / "whole").progress


def test_a_best_that_could_not_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one that is better than what is on the disk takes its place."""
    written = Trainer._write

    def full_once(self: Trainer, state: Any, progress: Any, values: Any) -> Path:
        if progress.num_steps == 6:
            raise OSError(28, "No space left on device")
        return written(self, state, progress, values)

    monkeypatch.setattr(Trainer, "_write", full_once)
    trainer = run(tmp_path, (0.2, 0.9, 0.5, 0.3))
    assert (trainer.progress.best_score, trainer.progress.best_step) == (0.5, 9)
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000009.safetensors"
    assert "the checkpoint of step 6 can't be written" in caplog.text


def test_the_best_counts_from_when_it_is_saved(tmp_path: Path) -> None:
    """What was evaluated without ``save_best`` is gone, however good."""
    run(tmp_path, (0.9, 0.2, 0.3, 0.1), epochs=2, save_best=False)
    trainer = run(tmp_path, (0.9, 0.2, 0.3, 0.1))
    assert (trainer.progress.best_score, trainer.progress.best_step) == (0.3, 9)
    assert torch.isfinite(latest(tmp_path).state["param/head.weight"]).all()


@pytest.mark.parametrize("stop_before", [None, 3, 6])
def test_a_run_in_steps_ends_in_the_middle_of_an_epoch_and_stays_there(tmp_path: Path, stop_before: int | None) -> None:
    """Two full batches an epoch; evaluated every four steps; resumed after its end nothing is left."""
    options = {"epochs": None, "iterations": 7, "eval_interval": 4, "checkpoint_interval": 3}
    if stop_before is not None:
        with pytest.raises(Stopped):
            run(tmp_path, (0.5,) * 9, stop_before, **options)
    for _ in range(2):
        trainer = run(tmp_path, (0.5,) * 9, **options)
        lines = read_metrics(tmp_path / "metrics.jsonl")
        assert [(line["step"], line["epoch"]) for line in lines if "loss" in line] == [
            (n + 1, n // 2) for n in range(7)
        ]
        assert [line["step"] for line in lines if "top1" in line] == [4, 7]
        assert trainer.progress.num_steps == latest(tmp_path).progress.num_steps == 7
        assert lines[-2]["lr"] == pytest.approx(trainer.config.train.min_lr)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept[-1] == "step-00000007.safetensors"


def test_a_run_belongs_to_the_contents_of_its_data(tmp_path: Path) -> None:
    """Not to the place that they lie in."""
    config = replace(
        make_config(DDP, str(tmp_path)), data={"type": "shards", "root": "here", "num_workers": 2, "lanes": 4}
    )
    moved = replace(config, data=config.data | {"root": "s3://there", "num_workers": 0})
    task = replace(make_task(), contents="3f5a")
    assert run_identity(config, task) == run_identity(moved, task)
    assert run_identity(config, task).data["contents"] == "3f5a"
    for other in (run_identity(config, replace(task, contents="77e0")), run_identity(config, make_task())):
        assert other.data != run_identity(config, task).data


def test_a_run_belongs_to_a_normalisation(tmp_path: Path) -> None:
    """Whoever asked for it."""
    config = make_config(DDP, str(tmp_path))
    first, same, other = (
        run_identity(config, replace(make_task(), normalisation=read_normalisation(key, name))).data
        for key, name in (("data.normalize", "clip"), ("model.normalize", "clip"), ("model.normalize", "imagenet"))
    )
    assert first == same != other
