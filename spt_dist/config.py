"""Configs: mmengine files with ``_base_`` and ``--cfg-options``, checked against typed sections.

A section is a dataclass; a key it does not have is refused with the nearest one it has. The sections ``data`` and
``method`` are open in their ``type``: the other keys are the arguments of the function that the type names.
"""

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from spt_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model. See ``models.classifier.build_classifier``."""

    name: str
    num_classes: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """Stage 1.

    Attributes:
        preset: name of a set of values for the keys below, from ``SENSITIVITY_PRESETS``. None of them may be given
            another value beside it.
        num_samples: how many training samples are scored.
        sample_order: which ones: "random", a seeded choice; or "file", the first (all, where there are fewer).
        batch_size: samples in one pass of a rank. With criterion "batch" also those whose mean loss has its gradient
            squared: the batches are then the same for every number of ranks, and each is one rank's as a whole.
        criterion: "per_sample" or "batch".
        train_mode: score with dropout and drop-path active.
        dtype: "bfloat16" or "float16" to run under autocast; sums are fp32 in any case.
        memory_limit_gib: split batches so that they keep at most this many GiB of activations ("per_sample" only).
        shard_sums: whether ranks keep parts of the sums; ``None`` for what suits the model.
        scores: folder of saved scores to use instead of a pass.
    """

    preset: str | None = None
    num_samples: int = 800
    sample_order: str = "random"
    batch_size: int = 32
    criterion: str = "per_sample"
    train_mode: bool = False
    dtype: str | None = None
    memory_limit_gib: float | None = None
    shard_sums: bool | None = None
    scores: str | None = None


SAMPLE_ORDERS = ("random", "file")
AUTOCAST_DTYPES = ("bfloat16", "float16")
# "released": SPT's published code (github.com/ziplab/SPT, engine.py): 16 batches of 32 in file order, in training mode.
SENSITIVITY_PRESETS: dict[str, dict[str, Any]] = {
    "released": {
        "num_samples": 512,
        "sample_order": "file",
        "batch_size": 32,
        "criterion": "batch",
        "train_mode": True,
    }
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The schedule.

    Attributes:
        epochs: passes over the training samples.
        iterations: training steps, in place of ``epochs``. The intervals below and ``warmup_epochs`` are in steps
            then, and each batch is full: what is left of an epoch is not used.
        batch_size: samples in one step over all ranks together.
        optimizer: "adamw" or "sgd".
        momentum: of SGD.
        lr: peak learning rate.
        head_lr_mult: factor of ``lr`` and ``warmup_lr`` for the head.
        schedule: how the rate falls: "cosine" or "poly".
        poly_power: of "poly".
        min_lr: learning rate at the end, of backbone and head alike.
        warmup_epochs: linear warm-up from ``warmup_lr``.
        warmup_lr: learning rate of the first step.
        weight_decay: on matrices and prompts, and on kernels of a head; vectors, single weights and ``cls_token`` are
            never decayed.
        clip_norm: largest norm of the gradient; ``None`` for no clipping.
        accumulation: passes in which a rank goes through its part of a step, to save memory.
        ema: decay of a moving average of what is trained, to be evaluated and saved instead; ``None`` for none.
        eval_interval: epochs between two evaluations; the end of the run is always evaluated. ``None`` for 10 epochs,
            and with ``iterations`` for the end alone.
        checkpoint_interval: epochs between two checkpoints; ``None`` for 5, and with ``iterations`` for the end alone.
        checkpoint_steps: steps between two checkpoints, beside those at the end of an epoch; ``None`` for none.
        keep_checkpoints: how many of the last checkpoints are kept.
        save_best: also keep the checkpoint that was best at its evaluation.
    """

    epochs: int | None = None
    iterations: int | None = None
    batch_size: int = 64
    optimizer: str = "adamw"
    momentum: float = 0.9
    lr: float = 1e-3
    head_lr_mult: float = 1.0
    schedule: str = "cosine"
    poly_power: float = 0.9
    min_lr: float = 1e-5
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6
    weight_decay: float = 1e-4
    clip_norm: float | None = None
    accumulation: int = 1
    ema: float | None = None
    eval_interval: int | None = None
    checkpoint_interval: int | None = None
    checkpoint_steps: int | None = None
    keep_checkpoints: int = 2
    save_best: bool = False


OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "poly")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How training is spread over ranks.

    Attributes:
        type: "ddp", "fsdp" or "deepspeed".
        zero_stage: 0, 1, 2 or 3 (deepspeed only).
        offload: keep the optimizer's state, and with stage 3 the weights, in the CPU's memory (deepspeed only).
        deepspeed: further settings as a dict, or the path of a DeepSpeed JSON (deepspeed only).
        shard_size: how many ranks share out one copy of the weights (fsdp only): ``None`` for all of them, 1 for a
            whole copy on each rank, any other divisor of their number for a copy on each group of so many ranks.
        amp: run the forward pass under autocast.
        amp_dtype: of autocast, "bfloat16" or "float16"; float16 scales the loss.
        frozen_dtype: what the frozen weights of Linear layers are kept in; ``None`` for fp32. Needs ``amp``.
        activation_checkpointing: keep only the blocks' inputs for the backward pass, and run each block again there.
        compile: backend of ``torch.compile`` for each block ("inductor"); ``None`` for none.
        timeout: seconds without progress after which a run with several ranks is ended.
    """

    type: str = "ddp"
    zero_stage: int = 2
    offload: bool = False
    deepspeed: dict[str, Any] | str | None = None
    shard_size: int | None = None
    amp: bool = False
    amp_dtype: str = "bfloat16"
    frozen_dtype: str | None = None
    activation_checkpointing: bool = False
    compile: str | None = None
    timeout: float = 600.0


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells while it goes on.

    Attributes:
        backends: mmengine's visualisation backends that get the curves: ``dict(type="TensorboardVisBackend")``,
            ``WandbVisBackend``, ``MLflowVisBackend`` with their arguments.
        interval: steps between two points of the curves.
        rank_files: write each rank's whole log to ``logs/rank-N.log`` in the work dir.
        profile_steps: how many steps torch's profiler records, after a few of warm-up; 0 for none.
        memory_snapshot: record the GPU's allocations over the same steps, for https://pytorch.org/memory_viz.
    """

    backends: list[dict[str, Any]] = field(default_factory=lambda: [{"type": "TensorboardVisBackend"}])
    interval: int = 10
    rank_files: bool = False
    profile_steps: int = 0
    memory_snapshot: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. ``data`` and ``method`` hold a ``type`` and the arguments of what it names.

    ``custom_imports=dict(imports=["my_modules"])``, mmengine's own key, imports one's own files before anything else.
    """

    model: ModelConfig
    data: dict[str, Any]
    method: dict[str, Any]
    train: TrainConfig
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    custom_imports: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    work_dir: str = ""


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a config file and check it.

    Args:
        path: a Python config as mmengine reads it.
        options: ``--cfg-options``: dotted keys and their values, taking precedence over the file.

    Raises:
        UserError: no such file; it can't be read; an unknown key; a value of the wrong type or out of range.
    """
    from mmengine.config import Config

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file; configs/ holds some to start from")
    if any(key.split(".")[0] == "custom_imports" for key in options or {}):
        raise UserError("--cfg-options custom_imports: imports come before options; write custom_imports into the file")
    try:
        content = Config.fromfile(str(path))
        content.merge_from_dict(dict(options or {}))
    # A config is a program: whatever it raises is a mistake in it, to be reported with the file's name.
    except Exception as error:
        raise UserError(f"{path}: can't be read as a config ({type(error).__name__}: {error})") from error
    values = content.to_dict()
    values["work_dir"] = values.get("work_dir") or f"work_dirs/{path.stem}"
    if isinstance(values.get("sensitivity"), dict):
        values["sensitivity"] = _with_preset(values["sensitivity"])
    config: RunConfig = _build(RunConfig, values, "")
    _check_ranges(config)
    return config


def check_arguments(
    function: Callable[..., Any], options: Mapping[str, Any], section: str, own: Iterable[str] = ()
) -> None:
    """Check an open section against the arguments of the function it goes to.

    Args:
        function: what ``options`` will be passed to.
        options: the section's keys and values.
        section: its name, for the error.
        own: leading arguments of the function that do not come from the config.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a required key that is missing.
    """
    parameters = {name: value for name, value in inspect.signature(function).parameters.items() if name not in set(own)}
    for key in options:
        if key not in parameters:
            raise _unknown(f"{section}.{key}", key, parameters)
    hints = typing.get_type_hints(function)
    for key, value in options.items():
        _convert(hints[key], value, f"{section}.{key}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise UserError(f"config: {section}.{name} is missing")


def lookup(kind: str, name: Any, known: Mapping[str, Any]) -> Any:
    """``known[name]``, or an error that names the nearest known one."""
    if name not in known:
        raise _unknown(f"{kind}={name!r}", str(name), known)
    return known[name]


def _with_preset(sensitivity: dict[str, Any]) -> dict[str, Any]:
    """The section with the values of its preset, if it names one."""
    preset = sensitivity.get("preset")
    if not isinstance(preset, str):
        return sensitivity
    wanted = lookup("sensitivity.preset", preset, SENSITIVITY_PRESETS)
    for key, value in wanted.items():
        if sensitivity.get(key, value) != value:
            raise UserError(
                f"config: sensitivity.{key}={sensitivity[key]!r}, but sensitivity.preset={preset!r} means {value!r}; "
                "leave one of the two out"
            )
    return wanted | sensitivity


def _build(section: Any, values: Any, prefix: str) -> Any:
    """Make the dataclass ``section`` from nested dicts."""
    if not isinstance(values, dict):
        raise UserError(f"config: {prefix.rstrip('.')} has to be a dict, not {values!r}")
    hints = typing.get_type_hints(section)
    for key in values:
        if key not in hints:
            raise _unknown(prefix + key, key, hints)
    for item in fields(section):
        if item.name not in values and not _has_default(item):
            raise UserError(f"config: {prefix}{item.name} is missing")
    return section(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    if hasattr(hint, "__dataclass_fields__"):
        return _build(hint, value, name + ".")
    # Python 3.10 reads `float | None = None` back as typing.Optional.
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    allowed = typing.get_args(hint) if is_union else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if float in plain and type(value) is int:
        return float(value)
    # bool is a subclass of int, but `epochs=True` is a mistake.
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        wanted = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in plain)
        raise UserError(f"config: {name}={value!r} has to be {wanted}")
    return value


def _has_default(item: Any) -> bool:
    from dataclasses import MISSING

    return item.default is not MISSING or item.default_factory is not MISSING


def _check_ranges(config: RunConfig) -> None:
    train, sensitivity, engine = config.train, config.sensitivity, config.engine
    at_least_one = {
        "model.num_classes": config.model.num_classes,
        "train.epochs": train.epochs,
        "train.iterations": train.iterations,
        "train.batch_size": train.batch_size,
        "train.eval_interval": train.eval_interval,
        "train.checkpoint_interval": train.checkpoint_interval,
        "train.keep_checkpoints": train.keep_checkpoints,
        "train.accumulation": train.accumulation,
        "train.checkpoint_steps": train.checkpoint_steps,
        "engine.shard_size": engine.shard_size,
        "log.interval": config.log.interval,
        "sensitivity.num_samples": sensitivity.num_samples,
        "sensitivity.batch_size": sensitivity.batch_size,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserError(f"config: {name}={value} has to be at least 1")
    not_negative = {
        "train.min_lr": train.min_lr,
        "train.warmup_lr": train.warmup_lr,
        "train.warmup_epochs": train.warmup_epochs,
        "train.weight_decay": train.weight_decay,
        "train.momentum": train.momentum,
        "log.profile_steps": config.log.profile_steps,
    }
    for name, number in not_negative.items():
        if not 0 <= number < math.inf:
            raise UserError(f"config: {name}={number} has to be 0 or more")
    above_zero = {
        "train.lr": train.lr,
        "train.head_lr_mult": train.head_lr_mult,
        "train.poly_power": train.poly_power,
        "train.clip_norm": train.clip_norm,
        "sensitivity.memory_limit_gib": sensitivity.memory_limit_gib,
        "engine.timeout": engine.timeout,
    }
    for name, positive in above_zero.items():
        if positive is not None and not 0 < positive < math.inf:
            raise UserError(f"config: {name}={positive} has to be above 0")
    _check_length(train)
    lookup("train.optimizer", train.optimizer, dict.fromkeys(OPTIMIZERS))
    lookup("train.schedule", train.schedule, dict.fromkeys(SCHEDULES))
    lookup("sensitivity.sample_order", sensitivity.sample_order, dict.fromkeys(SAMPLE_ORDERS))
    if sensitivity.dtype is not None:
        lookup("sensitivity.dtype", sensitivity.dtype, dict.fromkeys(AUTOCAST_DTYPES))
    lookup("engine.amp_dtype", engine.amp_dtype, dict.fromkeys(AUTOCAST_DTYPES))
    if engine.frozen_dtype is not None:
        lookup("engine.frozen_dtype", engine.frozen_dtype, dict.fromkeys(AUTOCAST_DTYPES))
        if not engine.amp:
            raise UserError("config: engine.frozen_dtype needs engine.amp=True, so that layers compute in that dtype")
    if train.ema is not None and not 0 < train.ema < 1:
        raise UserError(f"config: train.ema={train.ema} has to lie between 0 and 1; 0.9999 is usual")
    if not 0 <= config.seed < 2**31:
        raise UserError(f"config: seed={config.seed} has to lie between 0 and 2**31 - 1")
    for name in ("data", "method"):
        if "type" not in getattr(config, name):
            raise UserError(f"config: {name}.type is missing")


def _check_length(train: TrainConfig) -> None:
    if (train.epochs is None) == (train.iterations is None):
        raise UserError(
            f"config: train.epochs={train.epochs} and train.iterations={train.iterations}: give one of the two"
        )
    length = train.iterations if train.epochs is None else train.epochs
    if length is not None and train.warmup_epochs > length:
        unit = "iterations" if train.epochs is None else "epochs"
        raise UserError(f"config: train.warmup_epochs={train.warmup_epochs} is more than train.{unit}={length}")


def _unknown(where: str, key: str, known: Iterable[str]) -> UserError:
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return UserError(f"config: {where} is unknown; {hint}")
