"""A whole run from a config: model, sensitivity, plan, training, task file."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist.allocation.allocate import allocate
from spt_dist.allocation.costs import block_of
from spt_dist.allocation.kinds import find_kind
from spt_dist.allocation.plan import Plan
from spt_dist.allocation.released import eligible_names, matrix_names
from spt_dist.allocation.request import AllocationRequest
from spt_dist.config import RunConfig, check_arguments, lookup
from spt_dist.data.batches import deal_samples, load_batches
from spt_dist.data.task import Task
from spt_dist.data.tasks import build_task
from spt_dist.errors import UserError
from spt_dist.files import save_tensors, write_text
from spt_dist.models.classifier import build_classifier
from spt_dist.models.matrices import take_inventory
from spt_dist.parallel.checkpoints import Checkpoint, SampleOrder, find_checkpoint, load_checkpoint
from spt_dist.parallel.engines import OptimizerSettings, build_engine, check_engine
from spt_dist.parallel.launch import local_device
from spt_dist.progress import progress_bar
from spt_dist.sensitivity.diagnosis import NotFiniteError
from spt_dist.sensitivity.estimator import estimate_sensitivity
from spt_dist.sensitivity.scores import Scores
from spt_dist.training.record import put_aside, write_record
from spt_dist.training.trainer import Trainer
from spt_dist.tuning.delta import describe_delta
from spt_dist.tuning.inject import inject, print_trainable_parameters
from spt_dist.tuning.methods import PLAN_MAKERS, make_plan
from spt_dist.tuning.prompts import check_block


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind; ``summary.json`` in the work dir holds the same.

    Attributes:
        method: "spt-lora", "spt", "lora", "linear" or "full".
        num_trainable: trained parameters, head not counted.
        backbone_size: weights of the backbone, head not counted.
        num_head: parameters of the head.
        top1: accuracy on the held-out samples, 0 to 1.
        seconds_scoring, seconds_training: wall-clock time of the two stages.
        task_file: path of the task file.
        config: the config file.
    """

    method: str
    num_trainable: int
    backbone_size: int
    num_head: int
    top1: float
    seconds_scoring: float
    seconds_training: float
    task_file: str
    config: str


def check_config(config: RunConfig) -> None:
    """Everything about a config that can be refused before anything is built.

    Raises:
        UserError: an unknown engine, method or argument of a method.
    """
    check_engine(config.engine)
    options = method_options(config)
    if config.method["type"] == "spt":
        check_arguments(allocate, options, "method", own=["scores"])
    else:
        maker = lookup("method.type", config.method["type"], {**PLAN_MAKERS, "spt": None})
        check_arguments(maker, options, "method", own=["model"])


def method_options(config: RunConfig) -> dict[str, Any]:
    """The ``method`` section without its type."""
    return {key: value for key, value in config.method.items() if key != "type"}


def build_model(config: RunConfig) -> nn.Module:
    """The pre-trained model with a fresh head, as the config says; the same on every rank."""
    model = config.model
    return build_classifier(model.name, model.num_classes, model.kwargs, model.checkpoint, config.seed)


def score(config: RunConfig, model: nn.Module, task: Task) -> Scores:
    """Stage 1 on some of the training samples, or saved scores. Collective.

    The scores are the same for every number of ranks, up to rounding; but not in training mode with dropout or
    drop-path, where each rank draws its own.

    Raises:
        UserError: more samples are asked for than there are; or as ``estimate_sensitivity``.
    """
    wanted = config.sensitivity
    if wanted.scores is not None:
        return load_scores(wanted.scores, model)
    sample_ids = choose_samples(config, task.num_train)
    rank = dist.get_rank()
    same_batches = wanted.criterion == "batch"
    dealt = deal_samples(sample_ids, wanted.batch_size, rank, dist.get_world_size(), same_batches)
    limit = wanted.memory_limit_gib
    device = local_device()
    torch.manual_seed(config.seed + rank)
    with progress_bar("sensitivity", len(dealt), rank == 0) as bar:

        def batches() -> Any:
            for batch in load_batches(task.train, dealt, device):
                yield batch.inputs, batch.targets
                bar.advance()

        try:
            return estimate_sensitivity(
                model.to(device),
                batches(),
                F.cross_entropy,
                wanted.criterion,
                train_mode=wanted.train_mode,
                dtype=None if wanted.dtype is None else getattr(torch, wanted.dtype),
                memory_limit=None if limit is None else int(limit * 2**30),
                shard_sums=wanted.shard_sums,
                sample_ids=sample_ids,
            )
        except NotFiniteError as error:
            theirs = deal_samples(sample_ids, wanted.batch_size, error.rank, dist.get_world_size(), same_batches)
            sample = [sample for batch, _, _ in theirs for sample in batch][error.position]
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


def choose_samples(config: RunConfig, num_train: int) -> list[int]:
    """Indices of the training samples that stage 1 scores, ascending.

    Raises:
        UserError: a random choice of more samples than there are.
    """
    wanted = config.sensitivity
    if wanted.sample_order == "file":
        return list(range(min(wanted.num_samples, num_train)))
    if wanted.num_samples > num_train:
        raise UserError(f"config: sensitivity.num_samples={wanted.num_samples}, but the task has {num_train} samples")
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(num_train, generator=generator)[: wanted.num_samples].sort().values.tolist()


def make_run_plan(config: RunConfig, model: nn.Module, task: Task) -> tuple[Plan, Scores | None]:
    """The plan that the config's method makes for the model, and the scores if it needs any. Collective."""
    options = method_options(config)
    if config.method["type"] != "spt":
        return make_plan(config.method["type"], model, **options), None
    check_request(model, AllocationRequest(**options))
    scores = score(config, model, task)
    return allocate(scores, **options), scores


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


def run_training(config: RunConfig, config_path: str, resume: str | None = None) -> RunResult:
    """Run everything from a config to the task file. Collective; rank 0 writes.

    Args:
        config: the merged config.
        config_path: where it came from, for the record.
        resume: ``None``, "auto" or the path of a checkpoint.

    Raises:
        UserError: for whatever the user can mend.
    """
    check_config(config)
    work_dir = Path(config.work_dir)
    task = build_task(config.data, config.model.num_classes)
    model = build_model(config)
    check_setup(work_dir, task, model)
    path = None if resume is None else find_checkpoint(resume, work_dir / "checkpoints")
    checkpoint = None if path is None else load_checkpoint(path)
    started = time.perf_counter()
    plan, scores = make_run_plan(config, model, task) if checkpoint is None else (checkpoint.plan, None)
    seconds_scoring = time.perf_counter() - started
    # New modules start from the run's seed, so the loss curve does not depend on what was drawn before.
    torch.manual_seed(config.seed)
    tuned = inject(model, plan)
    if checkpoint is None:
        put_aside(work_dir)
    else:
        if checkpoint.fingerprint != tuned.spt_fingerprint:
            raise UserError(f"{checkpoint.path}: belongs to a backbone with other weights; check model.checkpoint")
        if config.method["type"] not in ("plan", plan.method.split("-")[0]):
            raise UserError(
                f"{checkpoint.path}: written by a run with method {plan.method}, this one has "
                f"method.type={config.method['type']!r}; resume with the same, or start a new run without --resume"
            )
        checkpoint.check_order(SampleOrder(config.seed, config.train.batch_size, task.num_train))
    if scores is not None:
        scores.save(work_dir / "scores")
    if dist.get_rank() == 0:
        write_record(work_dir, config, config_path)
        plan.save(work_dir / "plan.safetensors")
        print_trainable_parameters(tuned)

    started = time.perf_counter()
    top1, values = _train(config, tuned, task, checkpoint)
    result = RunResult(
        method=plan.method,
        num_trainable=plan.num_trainable,
        backbone_size=plan.backbone_size,
        num_head=sum(values[name].numel() for name in plan.head),
        top1=top1,
        seconds_scoring=seconds_scoring,
        seconds_training=time.perf_counter() - started,
        task_file=str(work_dir / "task.safetensors"),
        config=config_path,
    )
    if dist.get_rank() == 0:
        save_tensors(result.task_file, *describe_delta(tuned, values))
        write_text(work_dir / "summary.json", json.dumps(asdict(result), indent=1))
    dist.barrier()
    return result


def check_setup(work_dir: Path, task: Task, model: nn.Module) -> None:
    """Refuse what would fail in the middle of a run.

    Raises:
        UserError: the work dir is a file, or the model does not take the task's images.
    """
    if work_dir.exists() and not work_dir.is_dir():
        raise UserError(f"{work_dir}: is a file, but results need a folder; give another (--work-dir, --out)")
    image_CHW, _ = task.train[0]
    model.eval()
    try:
        with torch.no_grad():
            model(image_CHW.unsqueeze(0))
    # timm checks the size by assertion, torch's layers the channels with errors of their own.
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"config: the model does not take the data's images of shape {tuple(image_CHW.shape)} ({error}); "
            "make data.image_size and model.kwargs.img_size agree"
        ) from error


def _train(
    config: RunConfig, tuned: nn.Module, task: Task, checkpoint: Checkpoint | None
) -> tuple[float, dict[str, Tensor]]:
    """Stage 2: the final accuracy and the trained values, whole on every rank. Collective."""
    settings = OptimizerSettings(config.train.lr, config.train.weight_decay, config.train.clip_norm)
    engine = build_engine(config.engine, tuned, settings, local_device())
    trainer = Trainer(engine, task, config.train, config.seed, Path(config.work_dir), local_device())
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer.fit(), engine.trainable_values()


def with_overrides(
    config: RunConfig, work_dir: str | None = None, engine: str | None = None, amp: bool = False
) -> RunConfig:
    """The config with what the command line says about it."""
    new_engine = replace(config.engine, type=engine or config.engine.type, amp=amp or config.engine.amp)
    return replace(config, engine=new_engine, work_dir=work_dir or config.work_dir)
