"""A whole run from a config: model, sensitivity, plan, training, task file."""

import gc
import inspect
import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from spt_dist.allocation.allocate import allocate
from spt_dist.allocation.plan import Plan
from spt_dist.config import check_arguments, lookup
from spt_dist.data.batches import deal_samples, epoch_key
from spt_dist.data.loader import load_batches
from spt_dist.data.samples import SampleSet
from spt_dist.data.task import Task
from spt_dist.data.tasks import TASKS, build_task
from spt_dist.errors import UserError
from spt_dist.evaluation.scores import main_metric
from spt_dist.files import save_tensors, write_text
from spt_dist.models.checkpoints import WeightsFile
from spt_dist.models.classifier import create_model
from spt_dist.models.matrices import head_buffers
from spt_dist.models.sharded import whole_shape
from spt_dist.parallel.backbone import ZERO3, Backbone, build_backbone, training_form
from spt_dist.parallel.checkpoints import Checkpoint, find_checkpoint
from spt_dist.parallel.engines import build_engine, check_engine
from spt_dist.parallel.engines.optimizers import optimizer_settings
from spt_dist.parallel.launch import local_device
from spt_dist.parallel.signals import StopSignals
from spt_dist.sections import RunConfig, TrainConfig
from spt_dist.training.claim import claim
from spt_dist.training.curves import check_backends
from spt_dist.training.dry_run import DryRun, plan_run
from spt_dist.training.mixing import make_mixing
from spt_dist.training.monitor import SpeedSummary
from spt_dist.training.needs import image_errors
from spt_dist.training.profiling import check_profile
from spt_dist.training.rank_log import rank_log
from spt_dist.training.record import make_room, write_record
from spt_dist.training.reports import Report, ignore
from spt_dist.training.scoring import make_run_plan, method_options
from spt_dist.training.trainer import Trainer, run_identity
from spt_dist.tuning.delta import describe_delta
from spt_dist.tuning.inject import install, make_modules, print_trainable_parameters
from spt_dist.tuning.methods import PLAN_MAKERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind; ``summary.json`` in the work dir holds the same.

    Attributes:
        method: "spt-lora", "spt", "lora", "adapter", "vpt", "bias", "partial", "linear" or "full".
        num_trainable: trained parameters, head not counted.
        backbone_size: weights of the backbone, head not counted.
        num_head: parameters of the head.
        metric: the main metric of the task: "top1" or "mIoU".
        scores: every metric on the held-out samples, 0 to 1.
        seconds_scoring, seconds_training: wall-clock time of the two stages.
        task_file: path of the task file.
        config: the config file.
        speed: throughput, waiting for data and memory in training.
    """

    method: str
    num_trainable: int
    backbone_size: int
    num_head: int
    metric: str
    scores: dict[str, float]
    seconds_scoring: float
    seconds_training: float
    task_file: str
    config: str
    speed: SpeedSummary


def check_config(config: RunConfig) -> None:
    """Everything about a config that can be refused before anything is built.

    Raises:
        UserError: an unknown engine, method or argument of a method.
    """
    check_engine(config.engine)
    check_backends(config.log)
    check_profile(config.log)
    options = method_options(config)
    if config.method["type"] == "spt":
        check_arguments(allocate, options, "method", own=["scores"])
    else:
        maker = lookup("method.type", config.method["type"], {**PLAN_MAKERS, "spt": None})
        check_arguments(maker, options, "method", own=["model"])
    if config.train.ema is not None and training_form(config.engine) == ZERO3:
        raise UserError("config: train.ema does not work with ZeRO stage 3; use engine.type='fsdp' for both")


def run_training(
    config: RunConfig,
    config_path: str,
    resume: str | None = None,
    report: Report = ignore,
    stop: StopSignals | None = None,
) -> RunResult:
    """Run everything from a config to the task file. Collective; rank 0 writes.

    Args:
        config: the merged config.
        config_path: where it came from, for the record.
        resume: ``None``, "auto" or the path of a checkpoint.
        report: is told how far this rank is.
        stop: whether the run was asked to stop.

    Raises:
        UserError: for whatever the user can mend.
        Stopped: the run was asked to stop.
    """
    check_config(config)
    report(0, "looking at the data", limited=False)
    work_dir = Path(config.work_dir)
    task = build_task(config.data, config.model.num_classes, config.model.normalize)
    check_setup(work_dir, task, config)
    if task.normalisation is not None:
        logger.info("images are normalised as %s", task.normalisation)
    _warm_up(task)
    with claim(work_dir, config.engine.timeout if resume else 0.0, report):
        # Not before: until it ends, the run before goes on, and replaces its old checkpoints.
        checkpoint = find_checkpoint(resume, work_dir / "checkpoints")
        if checkpoint is not None:
            checkpoint.check(run_identity(config, task))
        report(0, "building the model")
        tuned, seconds_scoring = _build(config, task, checkpoint, report)
        if dist.get_rank() == 0:
            write_record(work_dir, config, config_path, task.normalisation)
            _plan_of(tuned).save(work_dir / "plan.safetensors")
            print_trainable_parameters(tuned)
        started = time.perf_counter()
        with rank_log(work_dir, dist.get_rank()) if config.log.rank_files else nullcontext():
            trainer, found = _train(config, tuned, task, checkpoint, report, stop)
        values = trainer.trained_values()
        seconds = (seconds_scoring, time.perf_counter() - started)
        result = _describe(tuned, found, seconds, work_dir, config_path, trainer.speed)
        if dist.get_rank() == 0:
            save_tensors(result.task_file, *describe_delta(tuned, values))
            write_text(work_dir / "summary.json", json.dumps(asdict(result), indent=1))
        dist.barrier()
    return result


def _build(config: RunConfig, task: Task, checkpoint: Checkpoint | None, report: Report) -> tuple[nn.Module, float]:
    """The model with its plan, and the seconds that the plan took; the work dir is this run's then. Collective."""
    work_dir = Path(config.work_dir)
    started = time.perf_counter()
    plan, scores, backbone = (
        make_run_plan(config, task, report) if checkpoint is None else (checkpoint.plan, None, None)
    )
    seconds = time.perf_counter() - started
    tuned = _inject(config, plan, backbone)
    if checkpoint is not None:
        checkpoint.check_backbone(str(tuned.spt_fingerprint))
    make_room(work_dir, checkpoint)
    if scores is not None:
        scores.save(work_dir / "scores")
    return tuned, seconds


def _plan_of(tuned: nn.Module) -> Plan:
    plan = tuned.spt_plan
    assert isinstance(plan, Plan)
    return plan


def _describe(
    tuned: nn.Module,
    scores: dict[str, float],
    seconds: tuple[float, float],
    work_dir: Path,
    config_path: str,
    speed: SpeedSummary,
) -> RunResult:
    """The result of a run with these scores; ``seconds`` of scoring and of training."""
    plan = _plan_of(tuned)
    return RunResult(
        method=plan.method,
        num_trainable=plan.num_trainable,
        backbone_size=plan.backbone_size,
        num_head=sum(prod(whole_shape(tuned.get_parameter(name))) for name in plan.head),
        metric=main_metric(scores),
        scores=scores,
        seconds_scoring=seconds[0],
        seconds_training=seconds[1],
        task_file=str(work_dir / "task.safetensors"),
        config=config_path,
        speed=speed,
    )


def plan_dry(config: RunConfig, world_size: int, memory_gib: float | None = None) -> DryRun:
    """What ``run_training`` would train and need; see ``plan_run``."""
    check_config(config)
    return plan_run(config, world_size, memory_gib)


def check_setup(work_dir: Path, task: Task, config: RunConfig) -> None:
    """Refuse what would fail in the middle of a run.

    Raises:
        UserError: the work dir is a file; the model does not take the task's images or the checkpoint; or batches can't
            be dealt out as the schedule or batch norm need them.
    """
    if work_dir.exists() and not work_dir.is_dir():
        raise UserError(f"{work_dir}: is a file, but results need a folder; give another (--work-dir, --out)")
    # The first, as far as a look at one sample goes; one that is bad and left out is stood for by a blank one.
    first = deal_samples([0], 1, 0, 1, same_batches=False, epoch=epoch_key(config.seed, 0))
    images_BCHW = next(load_batches(task.train, first, torch.device("cpu"), num_workers=0)).inputs
    model = create_model(config.model.name, config.model.num_classes, config.model.kwargs, torch.device("meta"))
    with image_errors(images_BCHW.shape[1:]), torch.no_grad():
        model.eval()(images_BCHW.to("meta"))
    if config.model.checkpoint is not None:
        WeightsFile(config.model.checkpoint).check(model, config.model.keep_head)
    _check_batches(task.num_train, config.train)
    make_mixing(config.train, task)
    if head_buffers(model):
        _check_batch_norm(config)


def _warm_up(task: Task) -> None:
    """Read what takes long now, while nobody waits for a step."""
    for samples in (task.train, task.val):
        if isinstance(samples, SampleSet):
            samples.warm_up(show_progress=dist.get_rank() == 0)


def _check_batches(num_train: int, train: TrainConfig) -> None:
    if train.iterations is not None and train.batch_size > num_train:
        raise UserError(
            f"config: train.batch_size={train.batch_size}, but the task has {num_train} training samples, and with "
            "train.iterations each batch is full; lower it"
        )


def _check_batch_norm(config: RunConfig) -> None:
    """Refuse what would let a head's batch norm see other samples than one process does."""
    train, parts = config.train, dist.get_world_size() * config.train.accumulation
    if config.sensitivity.train_mode:
        raise UserError(
            "config: sensitivity.train_mode=True: the head has batch norm, which would mix the images of a pass "
            "and move its means before training; score in eval mode"
        )
    if train.iterations is None or train.batch_size % parts:
        raise UserError(
            f"config: the head has batch norm, so that batches have to divide evenly: give train.iterations (not "
            f"epochs) and make train.batch_size={train.batch_size} a multiple of {parts} (ranks x train.accumulation)"
        )


def _inject(config: RunConfig, plan: Plan, backbone: Backbone | None) -> nn.Module:
    """The plan on a backbone in the form that the engine trains: the scored one, or a new one. Collective."""
    engine = config.engine
    if backbone is None:
        # What was scored goes before it is loaded anew, and it is held by cycles.
        gc.collect()
        if engine.frozen_dtype is not None and plan.trains_backbone:
            raise UserError(f"config: engine.frozen_dtype={engine.frozen_dtype!r}, but the plan leaves nothing frozen")
        form = training_form(engine)
        backbone = build_backbone(config.model, engine, form, config.seed, local_device(), plan)
    # New modules start from the run's seed, so the loss curve does not depend on what was drawn before.
    torch.manual_seed(config.seed)
    return install(backbone.model, plan, make_modules(backbone.model, plan), backbone.fingerprint)


def _train(
    config: RunConfig,
    tuned: nn.Module,
    task: Task,
    checkpoint: Checkpoint | None,
    report: Report,
    stop: StopSignals | None,
) -> tuple[Trainer, dict[str, float]]:
    """Stage 2: the trainer behind its last step, and the final evaluation. Collective."""
    engine = build_engine(config.engine, tuned, optimizer_settings(config.train), local_device())
    trainer = Trainer(engine, task, config, local_device(), report, stop)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer, trainer.fit()


def with_overrides(
    config: RunConfig,
    work_dir: str | None = None,
    engine: str | None = None,
    amp: bool = False,
    skip_bad_samples: bool = False,
) -> RunConfig:
    """The config with what the command line says about it."""
    new_engine = replace(config.engine, type=engine or config.engine.type, amp=amp or config.engine.amp)
    data = config.data
    if skip_bad_samples:
        if "skip_bad_samples" not in inspect.signature(lookup("data.type", data["type"], TASKS)).parameters:
            raise UserError(f"--skip-bad-samples: data.type={data['type']!r} has no files to skip")
        data = data | {"skip_bad_samples": True}
    return replace(config, engine=new_engine, work_dir=work_dir or config.work_dir, data=data)
