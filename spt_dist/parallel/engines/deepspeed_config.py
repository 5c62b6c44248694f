"""The DeepSpeed config of a run: what the engine decides, and what the user adds to it."""

import json
from pathlib import Path
from typing import Any

from spt_dist.errors import UserError
from spt_dist.sections import EngineConfig

# Key of a DeepSpeed config -> where the run's own config says the same.
_OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.lr and train.weight_decay",
    "scheduler": "train.lr, train.min_lr and train.warmup_epochs",
    "bf16": "engine.amp",
    "fp16": "engine.amp and engine.amp_dtype",
    "torch_autocast": "engine.amp",
    "amp": "engine.amp",
}
_DEFAULT_BUCKET = 500_000_000


def read_settings(engine: EngineConfig) -> dict[str, Any]:
    """The user's own DeepSpeed settings, from the dict or the JSON file that ``engine.deepspeed`` names.

    Values "auto", which files made for other trainers have, are left to us.

    Raises:
        UserError: no such file, no JSON; a key that the run's own config decides; or another ZeRO stage than there.
    """
    given = engine.deepspeed
    if given is None:
        return {}
    where = "engine.deepspeed"
    if isinstance(given, str):
        where = given
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"engine.deepspeed={where!r}: not a readable DeepSpeed JSON ({error})") from error
        if not isinstance(given, dict):
            raise UserError(f"{where}: a DeepSpeed config has to be an object, not {given!r}")
    settings: dict[str, Any] = _without_auto(given)
    for key, own in _OURS.items():
        value = settings.pop(key, None)
        if _says_something(key, value):
            raise UserError(f"{where}: {key}={value!r} is decided by {own} of the run's config; take it out")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{where}: zero_optimization={zero!r} has to be an object")
    stage = zero.get("stage", engine.zero_stage)
    if stage != engine.zero_stage:
        raise UserError(f"{where}: zero_optimization.stage={stage!r}, but engine.zero_stage={engine.zero_stage}")
    _check_zero(zero, where)
    return settings


def deepspeed_config(
    engine: EngineConfig, num_trained: int, clip_norm: float | None = None, accumulation: int = 1
) -> dict[str, Any]:
    """What ``deepspeed.initialize`` gets.

    Args:
        engine: stage, offloading, autocast and the user's own settings.
        num_trained: parameters that are trained.
        clip_norm: largest norm of the gradient, ``None`` for no clipping.
        accumulation: backward passes in a step.
    """
    settings = read_settings(engine)
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        # DeepSpeed makes room for 500 million gradients otherwise, 2 GB on each rank.
        "reduce_bucket_size": min(max(num_trained, 1), _DEFAULT_BUCKET),
    }
    if engine.zero_stage == 3:
        # Otherwise it keeps up to a billion gathered weights, which is all of a ViT, and fetches four blocks ahead.
        zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 10_000_000}
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if engine.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return settings | {
        # The loss is normalised by the global number of samples before DeepSpeed sees it, so this is only formal.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        # Left out, 0.19.8 would clip at 1.0.
        "gradient_clipping": clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own Adam for the CPU would have to be compiled; torch's does the same.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero | settings.get("zero_optimization", {}),
        "torch_autocast": {"enabled": engine.amp, "dtype": engine.amp_dtype},
        "steps_per_print": settings.get("steps_per_print", 1 << 60),
    }


def _says_something(key: str, value: Any) -> bool:
    """Whether a section that is ours to decide says more than that it is left to us."""
    if not isinstance(value, dict):
        return value is not None
    if key == "optimizer" and value.get("type", "AdamW") != "AdamW":
        return True
    return bool(value.get("params") if key in ("optimizer", "scheduler") else value.get("enabled"))


def _check_zero(zero: dict[str, Any], where: str) -> None:
    """Refuse what DeepSpeed would refuse when it starts, behind the scoring pass."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: zero_optimization.{name}={first['input']!r}: {first['msg']}") from error


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value
