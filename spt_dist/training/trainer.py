"""The training loop."""

import logging
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from spt_dist.config import TrainConfig
from spt_dist.data.batches import Batch, GlobalBatches, load_batches
from spt_dist.data.task import Task
from spt_dist.errors import UserError
from spt_dist.evaluation.classification import evaluate_top1
from spt_dist.parallel.checkpoints import Checkpoint, SampleOrder, save_checkpoint
from spt_dist.parallel.engines.base import Engine
from spt_dist.progress import progress_bar
from spt_dist.training.metrics import MetricsFile
from spt_dist.training.schedule import CosineSchedule

logger = logging.getLogger(__name__)


class Trainer:
    """Trains an engine's model on a task; the same loss curve for every engine and number of ranks."""

    def __init__(
        self, engine: Engine, task: Task, config: TrainConfig, seed: int, work_dir: Path, device: torch.device
    ) -> None:
        self.engine, self.task, self.config, self.seed = engine, task, config, seed
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.batches = GlobalBatches(task.num_train, config.batch_size, self.rank, self.world_size, seed)
        self.total_steps = config.epochs * self.batches.steps_per_epoch
        self.schedule = CosineSchedule(
            config.lr,
            config.min_lr,
            config.warmup_lr,
            round(config.warmup_epochs * self.batches.steps_per_epoch),
            self.total_steps,
        )
        self.checkpoint_dir = work_dir / "checkpoints"
        self.metrics_path = work_dir / "metrics.jsonl"
        self.num_steps = 0

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same run, whatever engine and number of ranks wrote it."""
        self.engine.load_state(checkpoint.state, checkpoint.num_steps)
        self.num_steps = checkpoint.num_steps
        logger.info("resumed from %s after %d of %d steps", checkpoint.path, self.num_steps, self.total_steps)

    def fit(self) -> float:
        """Train to the end of the last epoch; returns the final top-1 accuracy on the held-out samples."""
        metrics = MetricsFile(self.metrics_path, self.num_steps) if self.rank == 0 else None
        steps_per_epoch = self.batches.steps_per_epoch
        accuracy = math.nan
        with progress_bar("training", self.total_steps, self.rank == 0, self.num_steps) as bar:
            for epoch in range(self.num_steps // steps_per_epoch, self.config.epochs):
                self.engine.module.train()
                dealt = self.batches.deal(epoch, self.num_steps % steps_per_epoch)
                for batch in load_batches(self.task.train, dealt, self.device):
                    lr = self.schedule.at(self.num_steps)
                    loss, norm = self.train_step(batch, lr)
                    bar.advance(note=f"loss {loss:.4f}")
                    if metrics is not None:
                        metrics.write(step=self.num_steps, epoch=epoch, loss=loss, lr=lr, grad_norm=norm)
                done = epoch + 1
                if done % self.config.eval_interval == 0 or done == self.config.epochs:
                    accuracy = self.evaluate()
                    logger.info(
                        "epoch %d of %d: loss %.4f, top-1 %.2f %%", done, self.config.epochs, loss, 100 * accuracy
                    )
                    if metrics is not None:
                        metrics.write(step=self.num_steps, epoch=epoch, top1=accuracy)
                if done % self.config.checkpoint_interval == 0 or done == self.config.epochs:
                    self.save()
        if metrics is not None:
            metrics.close()
        # A run that is resumed after its last step has nothing left to train.
        return self.evaluate() if math.isnan(accuracy) else accuracy

    def train_step(self, batch: Batch, lr: float) -> tuple[float, float]:
        """One optimizer step on this rank's part of a global batch.

        Returns:
            The mean loss over the global batch and the norm of its gradient, the same on every rank.

        Raises:
            UserError: the loss is not finite; the parameters are as they were before the step.
        """
        # Randomness hangs on the step alone, so a resumed run draws what the uninterrupted one would have drawn.
        torch.manual_seed((self.seed * 1_000_003 + self.num_steps) * self.world_size + self.rank)
        losses_B = F.cross_entropy(self.engine(batch.inputs).float(), batch.targets, reduction="none")
        # Sum over this rank's samples, over the size of the global batch: summed over ranks this is the global mean.
        loss = (losses_B * batch.weights).sum() / batch.num_global
        global_loss = loss.detach().clone()
        dist.all_reduce(global_loss)
        if not math.isfinite(global_loss):
            raise UserError(
                f"the loss is {float(global_loss)} at step {self.num_steps} (rate {lr:.2e}); "
                "lower train.lr, set train.clip_norm, or look for NaN in the data"
            )
        # Engines average gradients over the ranks.
        self.engine.backward(loss * self.world_size)
        self.engine.set_lr(lr)
        norm = self.engine.step()
        self.num_steps += 1
        return float(global_loss), norm

    def evaluate(self) -> float:
        """Top-1 accuracy on the held-out samples. Collective."""
        return evaluate_top1(self.engine, self.engine.module, self.task, 4 * self.config.batch_size, self.device)

    def save(self) -> None:
        """Write a checkpoint. Collective."""
        state = self.engine.gather_state()
        if self.rank == 0:
            save_checkpoint(
                self.checkpoint_dir,
                state,
                self.engine.module,
                self.num_steps,
                SampleOrder(self.seed, self.config.batch_size, self.task.num_train),
                self.config.keep_checkpoints,
            )
        dist.barrier()
