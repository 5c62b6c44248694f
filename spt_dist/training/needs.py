"""What one rank needs for a run, from a model without memory."""

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from spt_dist.allocation.bound import densest_plan, most_trained
from spt_dist.allocation.plan import Plan
from spt_dist.allocation.request import AllocationRequest
from spt_dist.config import check_arguments, lookup
from spt_dist.data.ade20k import two_edges
from spt_dist.data.tasks import TASKS
from spt_dist.errors import UserError
from spt_dist.evaluation.footprint import bytes_of, share_out, share_scoring, weigh
from spt_dist.evaluation.rehearsal import PassMemory, Rehearsal
from spt_dist.models.checkpoints import WeightsFile, check_sum, log_account, resolve_checkpoint
from spt_dist.models.classifier import create_model
from spt_dist.models.matrices import Inventory, take_inventory
from spt_dist.models.precision import shorten_frozen
from spt_dist.models.weight_files import open_weights
from spt_dist.models.weight_lists import files_of
from spt_dist.parallel.engines.optimizers import optimizer_settings
from spt_dist.sections import ModelConfig, RunConfig
from spt_dist.tables import format_table
from spt_dist.tuning.methods import make_plan

GIB = 2**30
# Four int64 numbers tell where a single weight is.
_BYTES_OF_PLACE = 32
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Trainables:
    """What is trained.

    Attributes:
        count: parameters, head not counted; the most there can be where ``is_exact`` is not set.
        head: parameters of the head.
        always: those of ``count`` that are trained whatever the scores (``cls_token``).
        backbone: weights of the backbone.
        is_exact: whether the plan is known; SPT's is not before its scores are.
        table: for the terminal.
    """

    count: int
    head: int
    always: int
    backbone: int
    is_exact: bool
    table: str


@dataclass(frozen=True)
class CheckpointHeader:
    """The backbone's file: where the config says it is, its bytes (``None``: not there yet), dtypes of its tensors."""

    location: str
    size: int | None
    dtypes: tuple[str, ...]


class RunNeeds:
    """A run's model without memory, its plan, and what one rank holds of it."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        self._config, self._world_size = config, world_size
        model = self._make_model()
        inventory = take_inventory(model)
        self.image_shape = _image_shape(config, model)
        self.checkpoint = _read_header(config.model, model)
        own = -(-config.train.batch_size // world_size)
        self.samples = -(-own // config.train.accumulation)
        self.passes = -(-own // self.samples)
        plan, self.trainables = _find_trainables(config, model, inventory)
        self._shorten(model, plan.parameters)
        trains_all = plan.trains_backbone
        in_place = [*plan.parameters, *plan.head]
        num_trained = self.trainables.count + self.trainables.head
        weights = weigh(model, in_place, () if trains_all else in_place, num_trained, trains_all)
        if config.engine.activation_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm's models have it
        self._rehearsal = Rehearsal(model.train(), plan)
        # Positions of single weights are buffers too.
        if self.trainables.is_exact:
            buffers = bytes_of(self._rehearsal.model.buffers())
        else:
            buffers = weights.buffers + _BYTES_OF_PLACE * self.trainables.count
        moments = len(optimizer_settings(config.train).moments)
        weights = replace(weights, buffers=buffers, moments=moments)
        self.share = share_out(weights, config.engine, world_size)

    def rehearse(self, num_samples: int) -> PassMemory:
        """A pass of training.

        Raises:
            UserError: the model does not take the images.
        """
        engine, share = self._config.engine, self.share
        with image_errors(self.image_shape):
            return self._rehearsal.train(
                self.image_shape,
                num_samples,
                autocast=getattr(torch, engine.amp_dtype) if engine.amp else None,
                keeps_gradients=share.keeps_gradients and self.trainables.is_exact,
                accumulates=self.passes > 1,
            )

    def parts_of_pass(self, memory: PassMemory) -> dict[str, int]:
        """What takes memory in a pass of training, in bytes."""
        counted = self.share.keeps_gradients and self.trainables.is_exact
        return self._standing_parts() | {
            "gathered weights": self.share.gathered,
            "gradients": memory.gradients if counted else self.share.gradients,
            "communication buffers": self.share.buckets,
            "activations and temporaries": memory.activations,
        }

    def parts_of_step(self) -> dict[str, int]:
        """What takes memory while the optimizer steps, in bytes."""
        return self._standing_parts() | {
            "gradients": self.share.gradients,
            "communication buffers": self.share.buckets,
            "activations and temporaries": self.share.at_step,
        }

    def parts_of_scoring(self) -> dict[str, int]:
        """What takes memory in stage 1, in bytes."""
        wanted = self._config.sensitivity
        model = self._make_model()
        self._shorten(model, ())
        inventory = take_inventory(model)
        weights = weigh(model, (), [*inventory.head, *inventory.always_tuned], 0, trains_all=False)
        num_scores = sum(item.numel for item in inventory.parameters)
        share = share_scoring(weights, num_scores, self._config.engine, self._world_size, wanted.shard_sums)
        limit = wanted.memory_limit_gib
        with image_errors(self.image_shape):
            memory = Rehearsal(model).score(
                self.image_shape,
                min(wanted.batch_size, -(-wanted.num_samples // self._world_size)),
                per_sample=wanted.criterion == "per_sample",
                train_mode=wanted.train_mode,
                autocast=None if wanted.dtype is None else getattr(torch, wanted.dtype),
                memory_limit=None if limit is None else int(limit * GIB),
            )
        return {
            "frozen weights": share.weights,
            "gathered weights": share.gathered,
            "scores": share.scores,
            "activations and temporaries": memory.peak,
        }

    def _standing_parts(self) -> dict[str, int]:
        """What is there all through training."""
        return {
            "frozen weights": self.share.frozen,
            "trained weights": self.share.trained,
            "optimizer state": self.share.optimizer,
            "moving average": self.share.trained if self._config.train.ema is not None else 0,
        }

    def _make_model(self) -> nn.Module:
        wanted = self._config.model
        return create_model(wanted.name, wanted.num_classes, wanted.kwargs, torch.device("meta"))

    def _shorten(self, model: nn.Module, trained: Collection[str]) -> None:
        if self._config.engine.frozen_dtype is not None:
            shorten_frozen(model, getattr(torch, self._config.engine.frozen_dtype), trained)


def _find_trainables(config: RunConfig, model: nn.Module, inventory: Inventory) -> tuple[Plan, Trainables]:
    """The plan to rehearse with, and what it means."""
    options = {key: value for key, value in config.method.items() if key != "type"}
    known = dict(model.named_parameters())
    always = sum(known[name].numel() for name in inventory.always_tuned)
    if config.method["type"] == "spt":
        request = AllocationRequest(**options)
        plan, count = densest_plan(request, inventory), most_trained(request, inventory)
    else:
        plan = make_plan(config.method["type"], model, **options)
        count, always = plan.num_trainable, plan.num_in_place
    head = sum(known[name].numel() for name in plan.head if name in known)
    size, is_exact = inventory.backbone_size, config.method["type"] != "spt"
    table = plan.summary() if is_exact else _budget_table(count, always, size)
    table += f"\nhead: {head:,} parameters, always trained; backbone: {size:,} weights"
    return plan, Trainables(count, head, always, size, is_exact, table)


def _budget_table(count: int, always: int, backbone: int) -> str:
    rows = {"at most": count, "of them whatever the scores (cls_token)": always}
    body = [[what, f"{number:,}", f"{number / backbone:.3%}"] for what, number in rows.items()]
    title = "trainable parameters, head not counted; SPT finds out which in stage 1"
    return format_table(title, ["", "number", "share of the backbone"], body)


def _image_shape(config: RunConfig, model: nn.Module) -> Shape:
    """Shape of the task's images as far as its arguments say it, otherwise of those that timm made the model for.

    Raises:
        UserError: an unknown task or key.
    """
    arguments = {key: value for key, value in config.data.items() if key != "type"}
    build = lookup("data.type", config.data["type"], TASKS)
    check_arguments(build, arguments, "data")
    parameters = inspect.signature(build).parameters
    if "crop_size" in parameters:
        height, width = two_edges("crop_size", arguments.get("crop_size", parameters["crop_size"].default))
        return 3, height, width
    channels, *size = model.default_cfg["input_size"]  # type: ignore[index]  # timm's models have it
    if "image_size" in parameters:
        size = [arguments.get("image_size", parameters["image_size"].default)] * 2
    return channels, size[0], size[1]


@contextmanager
def image_errors(shape: Sequence[int]) -> Iterator[None]:
    """Tell what a model makes of images that it does not take.

    Raises:
        UserError: in the place of the model's own error.
    """
    try:
        yield
    # timm checks the size by assertion; torch's layers and mmseg's heads have errors of their own.
    except (AssertionError, RuntimeError, IndexError) as error:
        raise UserError(
            f"config: the model does not take the data's images of shape {tuple(shape)} ({error}); make the sizes "
            "that data and model.kwargs have for images agree"
        ) from error


def _read_header(config: ModelConfig, model: nn.Module) -> CheckpointHeader | None:
    """Look at the backbone's file, if the config has one, without loading its values.

    Raises:
        UserError: it is there, and is unreadable, another model's or, by its SHA-256, not the one that is meant.
    """
    location = config.checkpoint
    if location is None:
        return None
    try:
        path = resolve_checkpoint(location)
    except UserError:
        return CheckpointHeader(location, None, ())
    if config.sha256 is not None:
        check_sum(location, config.sha256)
    log_account(WeightsFile(location).check(model, config.keep_head))
    file = open_weights(path)
    dtypes = {file.dtype(name) for name in file.names()}
    num_bytes = sum(part.stat().st_size for part in files_of(path))
    return CheckpointHeader(location, num_bytes, tuple(sorted(dtypes)))
