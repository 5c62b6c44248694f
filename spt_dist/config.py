"""Configs: mmengine files with ``_base_`` and ``--cfg-options``, checked against typed sections.

A section is a dataclass; a key it does not have is refused with the nearest one it has. The sections ``data`` and
``method`` are open in their ``type``: the other keys are the arguments of the function that the type names.
"""

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from spt_dist.errors import UserError
from spt_dist.normalisation import read_normalisation
from spt_dist.sections import (
    AUTOCAST_DTYPES,
    OPTIMIZERS,
    SAMPLE_ORDERS,
    SCHEDULES,
    SENSITIVITY_PRESETS,
    ModelConfig,
    RunConfig,
    TrainConfig,
)

_DIGITS = re.compile("[0-9a-fA-F]{8,64}")


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a config file and check it.

    Args:
        path: a Python config as mmengine reads it.
        options: ``--cfg-options``: dotted keys and their values, taking precedence over the file.

    Raises:
        UserError: no such file; it can't be read; an unknown key; a value of the wrong type or out of range.
    """
    path = Path(path)
    return make_config(read_values(path, options or {}), path)


def read_values(path: Path, *changes: Mapping[str, Any]) -> dict[str, Any]:
    """What a config file says, unchecked.

    Args:
        path: a Python config as mmengine reads it.
        changes: merged in one after another: nested dicts, or dotted keys and their values.

    Raises:
        UserError: no such file, or it can't be read.
    """
    from mmengine.config import Config

    if not path.is_file():
        raise UserError(f"{path}: no such config file; configs/ holds some to start from")
    if any(key.split(".")[0] == "custom_imports" for change in changes for key in change):
        raise UserError("--cfg-options custom_imports: imports come before options; write custom_imports into the file")
    try:
        content = Config.fromfile(str(path))
        for change in changes:
            content.merge_from_dict(dict(change))
    # A config is a program: whatever it raises is a mistake in it, to be reported with the file's name.
    except Exception as error:
        raise UserError(f"{path}: can't be read as a config ({type(error).__name__}: {error})") from error
    values: dict[str, Any] = content.to_dict()
    return values


def make_config(values: dict[str, Any], path: Path) -> RunConfig:
    """Check what a config file says.

    Args:
        values: see ``read_values``.
        path: where they come from.

    Raises:
        UserError: an unknown key; a value of the wrong type or out of range; or the file is of a suite.
    """
    if "suite" in values:
        raise UserError(f"{path}: is a suite of several tasks; take one task's config here")
    values["work_dir"] = values.get("work_dir") or f"work_dirs/{path.stem}"
    if isinstance(values.get("sensitivity"), dict):
        values["sensitivity"] = _with_preset(values["sensitivity"])
    config: RunConfig = _build(RunConfig, values, "")
    _check_ranges(config)
    _check_choices(config)
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
        "train.mixup": train.mixup,
        "train.cutmix": train.cutmix,
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
    if train.ema is not None and not 0 < train.ema < 1:
        raise UserError(f"config: train.ema={train.ema} has to lie between 0 and 1; 0.9999 is usual")
    if not 0 <= config.seed < 2**31:
        raise UserError(f"config: seed={config.seed} has to lie between 0 and 2**31 - 1")


def _check_choices(config: RunConfig) -> None:
    train, sensitivity, engine = config.train, config.sensitivity, config.engine
    _check_checkpoint(config.model)
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
    for name, wanted in {"model": config.model.normalize, "data": config.data.get("normalize")}.items():
        if wanted is not None:
            read_normalisation(f"{name}.normalize", wanted)
    for name in ("data", "method"):
        if "type" not in getattr(config, name):
            raise UserError(f"config: {name}.type is missing")


def _check_checkpoint(model: ModelConfig) -> None:
    if model.sha256 is not None and not _DIGITS.fullmatch(model.sha256):
        raise UserError(
            f"config: model.sha256={model.sha256!r} has to be the 64 hexadecimal digits of a SHA-256, or at least the "
            "first 8 of them"
        )
    for name, value in (("sha256", model.sha256), ("keep_head", model.keep_head)):
        if value and model.checkpoint is None:
            raise UserError(f"config: model.{name}={value!r} is about a checkpoint, but model.checkpoint is None")


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
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
    return UserError(f"config: {where} is unknown; {hint}")
