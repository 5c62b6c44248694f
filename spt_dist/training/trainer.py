"""The training loop."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spt_dist.data.batches import GlobalBatches
from spt_dist.data.loader import Batch, Skipped, leaves_out_bad, load_batches, order_of
from spt_dist.data.task import Task
from spt_dist.errors import UserError
from spt_dist.evaluation.left_out import gather_left_out
from spt_dist.evaluation.scores import evaluate, main_metric
from spt_dist.files import save_tensors
from spt_dist.models.losses import sample_losses
from spt_dist.parallel.checkpoints import Checkpoint, Progress, RunIdentity, mark_best, save_checkpoint
from spt_dist.parallel.engines.base import Engine, State, keep_on_rank_0
from spt_dist.parallel.signals import StopSignals
from spt_dist.progress import progress_bar
from spt_dist.sections import RunConfig
from spt_dist.training.ema import MovingAverage
from spt_dist.training.metrics import MetricsFile
from spt_dist.training.mixing import make_mixing
from spt_dist.training.monitor import Monitor, SpeedSummary
from spt_dist.training.profiling import profiled_steps
from spt_dist.training.reports import Report, ignore
from spt_dist.training.schedule import make_schedule
from spt_dist.training.timetable import make_timetable
from spt_dist.tuning.delta import describe_delta

logger = logging.getLogger(__name__)
# What of a config's section ``data`` says where samples are and how they are read, not which.
READING_KEYS = ("root", "num_workers", "skip_bad_samples", "in_memory")
# What of a config's section ``train`` the loss curve depends on, beside the batches.
SCHEDULE_KEYS = (
    *("epochs", "iterations", "optimizer", "momentum", "lr", "head_lr_mult", "schedule", "poly_power", "min_lr"),
    *("warmup_epochs", "warmup_lr", "weight_decay", "clip_norm", "ema", "mixup", "cutmix"),
)


class Trainer:
    """Trains an engine's model on a task; the same loss curve for every engine and number of ranks."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        config: RunConfig,
        device: torch.device,
        report: Report = ignore,
        stop: StopSignals | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            engine: with the injected model.
            task: the data.
            config: of the run.
            device: the model's.
            report: is told how many steps are done, and what this rank does next.
            stop: whether the run was asked to stop.
        """
        self.engine, self.task, self.config, self.device = engine, task, config, device
        self.report, self.stop = report, stop or StopSignals()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        train = config.train
        self.sample_losses = sample_losses(engine.module)
        only_full, order = train.iterations is not None, order_of(task.train)
        self.batches = GlobalBatches(
            task.num_train, train.batch_size, self.rank, self.world_size, config.seed, only_full, order
        )
        self.skipped = Skipped()
        self.timetable = make_timetable(train, self.batches)
        lengths = self.timetable.steps_per_epoch, self.timetable.total_steps
        self.schedule = make_schedule(train, 1.0, *lengths)
        self.head_schedule = make_schedule(train, train.head_lr_mult, *lengths)
        self.mixing = make_mixing(train, task)
        self.average = None if train.ema is None else MovingAverage(engine.module, train.ema)
        self.work_dir = Path(config.work_dir)
        self.checkpoint_dir = self.work_dir / "checkpoints"
        self.progress = Progress()
        self.speed = SpeedSummary(None, None, [])

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same run, whatever engine and number of ranks wrote it."""
        self.engine.load_state(checkpoint.state)
        if self.average is not None:
            self.average.load(checkpoint.state)
        self.progress = checkpoint.progress
        total = self.timetable.total_steps
        logger.info("resumed from %s after %d of %d steps", checkpoint.path, self.progress.num_steps, total)

    def fit(self) -> dict[str, float]:
        """Train to the last step; returns the final evaluation on the held-out samples, see ``evaluation.scores``.

        Raises:
            Stopped: the run was asked to; a checkpoint is saved.
            UserError: the loss or its gradient is not finite; names the samples.
        """
        table, first = self.timetable, self.progress.num_steps
        scores: dict[str, float] = {}
        with (
            self.stop.deferred(),
            Monitor(self.config, self.device, first) as monitor,
            MetricsFile(self.work_dir / "metrics.jsonl", first, enabled=self.rank == 0) as metrics,
            profiled_steps(self.config.log, self.work_dir, self.rank) as profiler,
            progress_bar("training", table.total_steps, self.rank == 0, first) as bar,
        ):
            self.engine.module.train()
            for batch in monitor.timed(self._load()):
                epoch = self.progress.num_steps // table.steps_per_epoch
                lr, head_lr = (rates.at(self.progress.num_steps) for rates in (self.schedule, self.head_schedule))
                loss, norm, must_stop = self.train_step(batch, lr, head_lr)
                step = self.progress.num_steps
                metrics.write(step=step, epoch=epoch, loss=loss, lr=lr, grad_norm=norm)
                monitor.step(step=step, loss=loss, lr=lr, grad_norm=norm, num_samples=batch.num_global)
                profiler.step()
                bar.advance(note=f"loss {loss:.4f}")
                # The evaluation comes before the checkpoint: a run that goes on from there has it.
                best: float | None = None
                if table.evaluates(step):
                    scores = self.evaluate()
                    best = self._new_best(scores)
                    metrics.write(step=step, epoch=epoch, **scores)
                    monitor.evaluation(step, **scores)
                if table.ends_epoch(step):
                    monitor.epoch_end(epoch)
                if table.saves(step) or best is not None or must_stop:
                    self.save(monitor, best, is_needed=must_stop)
                if must_stop:
                    raise self.stop.stopped(step)
            self.speed = monitor.summary()
        self._tell_skipped()
        # A run that is resumed after its last step has nothing left to train.
        return scores or self.evaluate()

    def train_step(self, batch: Batch, lr: float, head_lr: float | None = None) -> tuple[float, float, bool]:
        """One optimizer step on this rank's part of a global batch, at the given learning rates.

        Args:
            batch: this rank's part.
            lr: of everything outside the head.
            head_lr: of the head; ``None`` for the same.

        Returns:
            The mean loss over the global batch, the norm of its gradient, and whether any rank was asked to stop; the
            same on every rank.

        Raises:
            UserError: loss or gradient is not finite; the parameters are as they were before the step.
        """
        num_steps = self.progress.num_steps
        self.report(num_steps, "training step")
        # Randomness hangs on the step alone, so a resumed run draws what the uninterrupted one would have drawn.
        torch.manual_seed((self.config.seed * 1_000_003 + num_steps) * self.world_size + self.rank)
        if self.mixing is not None:
            batch = self.mixing(batch)
        parts = batch.split(self.config.train.accumulation)
        # The loss over the ranks, and how many of them were asked to stop.
        sums = torch.zeros(2, device=self.device)
        losses: list[Tensor] = []
        for part in parts:
            with self.engine.passing(is_last=part is parts[-1]):
                losses_B = self.sample_losses(self.engine(part.inputs), part.targets)
                # Sum over this rank's samples, over the size of the global batch: over the ranks this is the mean.
                loss = (losses_B * part.weights).sum() / part.num_global
                # Engines average gradients over the ranks.
                self.engine.backward(loss * self.world_size)
            sums[0] += loss.detach()
            losses.append(losses_B.detach())
        sums[1] += self.stop.requested
        dist.all_reduce(sums)
        global_loss, num_stopped = sums.tolist()
        if not math.isfinite(global_loss):
            raise self._not_finite("loss", global_loss, lr, batch, torch.cat(losses))
        self.engine.set_lr(lr, lr if head_lr is None else head_lr)
        norm = self.engine.step()
        if not math.isfinite(norm) and not self.engine.skips_overflow:
            raise self._not_finite("norm of the gradient", norm, lr, batch, torch.cat(losses))
        if self.average is not None:
            self.average.update()
        self.progress = replace(self.progress, num_steps=num_steps + 1)
        return global_loss, norm, num_stopped > 0

    def evaluate(self) -> dict[str, float]:
        """The metrics on the held-out samples, the main one first. Collective."""

        def forward(inputs: Tensor) -> Any:
            self.report(self.progress.num_steps, "evaluation")
            return self.engine(inputs)

        with nullcontext() if self.average is None else self.average.in_place():
            batch_size = 4 * self.config.train.batch_size
            return evaluate(forward, self.engine.module, self.task, batch_size, self.device)

    def trained_values(self) -> State:
        """What the task file holds: the trained values, or their average, whole on rank 0. Collective."""
        if self.average is not None:
            return keep_on_rank_0(self.average.whole())
        return self.engine.trainable_values()

    def save(self, monitor: Monitor, best_score: float | None = None, is_needed: bool = False) -> None:
        """Write a checkpoint, and the task file of the best one. Collective.

        Where the disk is full the run goes on, and the last good checkpoint stays.

        Args:
            monitor: is told how long it took.
            best_score: of the evaluation at this step, if none before was better and that is to be saved.
            is_needed: whether the run ends after this, so that an error is one.

        Raises:
            OSError: it can't be written, and ``is_needed``.
        """
        step, progress = self.progress.num_steps, self.progress
        if best_score is not None:
            progress = replace(progress, best_score=best_score, best_step=step)
        self.report(step, "saving a checkpoint")
        started = time.perf_counter()
        state = self.engine.gather_state()
        if self.average is not None:
            state |= keep_on_rank_0(self.average.state())
        values = {} if best_score is None else self.trained_values()
        is_written = torch.zeros(1, device=self.device)
        if self.rank == 0:
            try:
                path = self._write(state, progress, values)
                is_written += 1
            except OSError as error:
                if is_needed:
                    raise
                logger.error("the checkpoint of step %d can't be written (%s); the last good one stays", step, error)
            else:
                monitor.saved(step, path, time.perf_counter() - started, path.stat().st_size)
        dist.broadcast(is_written, 0)
        if is_written:
            self.progress = progress

    def _write(self, state: State, progress: Progress, best_values: State) -> Path:
        """Write a checkpoint and, where there are values of a new best, mark it and write their task file."""
        keep, module = self.config.train.keep_checkpoints, self.engine.module
        path = save_checkpoint(self.checkpoint_dir, state, module, progress, run_identity(self.config, self.task), keep)
        if best_values:
            mark_best(self.checkpoint_dir, path)
            save_tensors(self.work_dir / "task_best.safetensors", *describe_delta(module, best_values))
        return path

    def _new_best(self, scores: dict[str, float]) -> float | None:
        """The main metric, if best ones are kept and none before was better."""
        score, best = scores[main_metric(scores)], self.progress.best_score
        return score if self.config.train.save_best and (best is None or score > best) else None

    def _load(self) -> Iterator[Batch]:
        """The rest of the run's batches. Those who read them ahead go on doing so at the end of an epoch."""
        num_steps = self.progress.num_steps
        rest = self.batches.steps(num_steps, self.timetable.total_steps)
        self.report(num_steps, "loading data")
        for batch in load_batches(self.task.train, rest, self.device, self.skipped):
            if leaves_out_bad(self.task.train):
                num_good = batch.weights.sum()
                dist.all_reduce(num_good)
                # Where no rank has a good sample, each weight is 0 and the mean shall be too.
                batch = replace(batch, num_global=max(1, int(num_good)))
            yield batch
            self.report(self.progress.num_steps, "loading data")

    def _tell_skipped(self) -> None:
        """Log how many training samples were left out since this run began or was resumed. Collective."""
        if leaves_out_bad(self.task.train):
            num_bad = len(gather_left_out(self.skipped))
            if num_bad and self.rank == 0:
                logger.warning("%d of %d training samples were left out", num_bad, self.task.num_train)

    def _not_finite(self, what: str, value: float, lr: float, batch: Batch, losses_B: Tensor) -> UserError:
        """Which samples of which rank gave no finite loss. Collective."""
        kept = (~losses_B.isfinite()).tolist()
        bad = [sample for sample, is_bad in zip(batch.samples, kept, strict=True) if is_bad]
        bad_R: list[list[int]] = [bad] * self.world_size
        dist.all_gather_object(bad_R, bad)
        where = "; ".join(f"rank {rank}: {_short(samples)}" for rank, samples in enumerate(bad_R) if samples)
        found = f"of training samples ({where})" if where else "though each sample's loss is finite"
        return UserError(
            f"the {what} is {value} at step {self.progress.num_steps} (rate {lr:.2e}), {found}; "
            "lower train.lr, set train.clip_norm, or look for NaN in the data"
        )


def run_identity(config: RunConfig, task: Task) -> RunIdentity:
    """What a checkpoint has to have in common with a run that goes on with it."""
    train, model = config.train, config.model
    contents: dict[str, Any] = {"contents": task.contents} if task.contents else {}
    if task.normalisation is not None:
        contents["normalisation"] = [list(task.normalisation.mean), list(task.normalisation.std)]
    return RunIdentity(
        seed=config.seed,
        batch_size=train.batch_size,
        num_train=task.num_train,
        data={key: value for key, value in config.data.items() if key not in READING_KEYS} | contents,
        model={"name": model.name, "num_classes": model.num_classes, "kwargs": model.kwargs},
        method={key: value for key, value in config.method.items() if key != "path"},
        schedule={
            "method.path": config.method.get("path"),
            "train": {name: getattr(train, name) for name in SCHEDULE_KEYS},
        },
    )


def _short(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:10])) + ", ..." * (len(samples) > 10)
