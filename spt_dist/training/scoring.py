"""Stage 1 of a run: which samples are scored, under which engine, and the plan that comes of it."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from spt_dist.allocation.allocate import allocate
from spt_dist.allocation.costs import block_of
from spt_dist.allocation.kinds import find_kind
from spt_dist.allocation.plan import Plan
from spt_dist.allocation.released import eligible_names, matrix_names
from spt_dist.allocation.request import AllocationRequest
from spt_dist.data.batches import deal_samples, epoch_key
from spt_dist.data.loader import Skipped, leaves_out_bad, load_batches, order_of
from spt_dist.data.task import Task
from spt_dist.errors import UserError
from spt_dist.evaluation.left_out import gather_left_out
from spt_dist.models.classifier import build_classifier, create_model
from spt_dist.models.losses import sample_losses
from spt_dist.models.matrices import take_inventory
from spt_dist.parallel.backbone import Backbone, build_backbone, scoring_form, training_form
from spt_dist.parallel.launch import local_device
from spt_dist.progress import progress_bar
from spt_dist.sections import RunConfig
from spt_dist.sensitivity.diagnosis import NotFiniteError
from spt_dist.sensitivity.estimator import estimate_sensitivity
from spt_dist.sensitivity.scores import Scores
from spt_dist.training.reports import Report, ignore
from spt_dist.tuning.methods import make_plan
from spt_dist.tuning.prompts import check_block

logger = logging.getLogger(__name__)


def method_options(config: RunConfig) -> dict[str, Any]:
    """The ``method`` section without its type."""
    return {key: value for key, value in config.method.items() if key != "type"}


def build_model(config: RunConfig) -> nn.Module:
    """The pre-trained model with a fresh head, whole and on the CPU, as the config says; the same on every rank."""
    model = config.model
    return build_classifier(model.name, model.num_classes, model.kwargs, model.checkpoint, config.seed)


def build_scored_model(config: RunConfig) -> Backbone:
    """The pre-trained model in the form in which its engine has it scored. Collective."""
    return build_backbone(config.model, config.engine, scoring_form(config.engine), config.seed, local_device())


def score(config: RunConfig, model: nn.Module, task: Task, report: Report = ignore) -> Scores:
    """Stage 1 on some of the training samples, or saved scores. Collective.

    The scores are the same for every number of ranks, up to rounding; but not in training mode with dropout or
    drop-path, where each rank draws its own.

    Raises:
        UserError: more samples are asked for than there are; or as ``estimate_sensitivity``.
    """
    wanted = config.sensitivity
    if wanted.scores is not None:
        return load_scores(wanted.scores, model)
    sample_ids = choose_samples(config, task)
    if leaves_out_bad(task.train):
        sample_ids = _without_bad(config, task, sample_ids, report)
    rank, key = dist.get_rank(), epoch_key(config.seed, 0)
    same_batches = wanted.criterion == "batch"
    dealt = deal_samples(sample_ids, wanted.batch_size, rank, dist.get_world_size(), same_batches, key)
    limit = wanted.memory_limit_gib
    # Layers whose weights are kept in a shorter format run in that format.
    dtype = wanted.dtype or config.engine.frozen_dtype
    device = local_device()
    torch.manual_seed(config.seed + rank)
    with progress_bar("sensitivity", len(dealt), rank == 0) as bar:

        def batches() -> Any:
            skipped = Skipped()
            for batch in load_batches(task.train, dealt, device, skipped):
                if skipped.indices:
                    raise UserError(
                        f"training sample {min(skipped.indices)} could be read at first, and can not any more"
                    )
                report(0, "scoring")
                yield batch.inputs, batch.targets
                bar.advance()

        try:
            return estimate_sensitivity(
                model,
                batches(),
                sample_losses(model),
                wanted.criterion,
                train_mode=wanted.train_mode,
                dtype=None if dtype is None else getattr(torch, dtype),
                memory_limit=None if limit is None else int(limit * 2**30),
                shard_sums=wanted.shard_sums,
                sample_ids=sample_ids,
            )
        except NotFiniteError as error:
            theirs = deal_samples(sample_ids, wanted.batch_size, error.rank, dist.get_world_size(), same_batches)
            sample = [sample for batch in theirs for sample in batch.indices][error.position]
            raise UserError(f"{error.where}, for training sample {sample}") from error


def load_scores(folder: str, model: nn.Module) -> Scores:
    """Saved scores of ``model``. Collective.

    Raises:
        UserError: as ``Scores.load``; or they are another model's.
    """
    scores = Scores.load(folder)
    inventory = take_inventory(model)
    parameters = inventory.by_name()
    for name, shape in zip(scores.names, scores.shard.index.shapes, strict=True):
        own = parameters.get(name)
        if own is None or own.shape != shape or scores.info.backbone_size != inventory.backbone_size:
            raise UserError(
                f"sensitivity.scores={folder}: scores of another model, of {scores.info.backbone_size:,} weights and "
                f"with {name} of shape {shape}; score this one, or give the config of the other"
            )
    return scores


def choose_samples(config: RunConfig, task: Task) -> list[int]:
    """Indices of the training samples that stage 1 scores, ascending.


    Raises:
        UserError: more samples than there are, unless they come in file order.
    """
    wanted, num_train = config.sensitivity, task.num_train
    if wanted.sample_order == "file":
        return list(range(min(wanted.num_samples, num_train)))
    if wanted.num_samples > num_train:
        raise UserError(f"config: sensitivity.num_samples={wanted.num_samples}, but the task has {num_train} samples")
    order = order_of(task.train)
    if wanted.sample_order == "epoch" and order is not None:
        shuffled = order(epoch_key(config.seed, 0))
    else:
        shuffled = torch.randperm(num_train, generator=torch.Generator().manual_seed(config.seed))
    return shuffled[: wanted.num_samples].sort().values.tolist()


def _without_bad(config: RunConfig, task: Task, sample_ids: list[int], report: Report) -> list[int]:
    """Those samples that can be read; each is, by one rank. Collective.

    Raises:
        UserError: none can.
    """
    skipped, key = Skipped(), epoch_key(config.seed, 0)
    batch_size = config.sensitivity.batch_size
    dealt = deal_samples(sample_ids, batch_size, dist.get_rank(), dist.get_world_size(), False, key)
    for _ in load_batches(task.train, dealt, torch.device("cpu"), skipped):
        report(0, "looking for bad samples")
    bad = gather_left_out(skipped)
    if bad == set(sample_ids):
        raise UserError(f"none of the {len(bad):,} training samples to be scored can be read, see the warnings above")
    if bad and dist.get_rank() == 0:
        logger.warning("%d of %d samples to be scored are left out", len(bad), len(sample_ids))
    return [sample for sample in sample_ids if sample not in bad]


def make_run_plan(
    config: RunConfig, task: Task, report: Report = ignore
) -> tuple[Plan, Scores | None, Backbone | None]:
    """The plan that the config's method makes; scores and the scored backbone if it needs any. Collective."""
    options = method_options(config)
    if config.method["type"] != "spt":
        model = config.model
        empty = create_model(model.name, model.num_classes, model.kwargs, torch.device("meta"))
        return make_plan(config.method["type"], empty, **options), None, None
    backbone = build_scored_model(config)
    check_request(backbone.model, AllocationRequest(**options))
    scores = score(config, backbone.model, task, report)
    can_train = training_form(config.engine) == scoring_form(config.engine)
    return allocate(scores, **options), scores, backbone if can_train else None


def check_request(model: nn.Module, request: AllocationRequest) -> None:
    """Refuse what ``allocate`` and ``inject`` would refuse after the scoring pass.

    Raises:
        UserError: as ``AllocationRequest.resolve``; the preset "released" does not know the model's names; or its
            blocks take no prompts.
    """
    inventory = take_inventory(model)
    reserved = sum(model.get_parameter(name).numel() for name in inventory.always_tuned)
    request.resolve(inventory.backbone_size, reserved)
    matrices = [parameter.name for parameter in inventory.parameters if parameter.is_matrix]
    if request.preset == "released":
        matrix_names(eligible_names(inventory.by_name()), matrices)
    if request.structured is not None and find_kind(request.structured).takes_block:
        for block in dict.fromkeys(filter(None, map(block_of, matrices))):
            check_block(model, block)
