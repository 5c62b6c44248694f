"""The sections of a config, as typed dataclasses. ``spt_dist.config`` reads files into them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model. See ``models.classifier.build_classifier``.

    Attributes:
        name: timm's name, or "mmseg.EncoderDecoder".
        num_classes: outputs of the head.
        kwargs: further arguments of ``timm.create_model``, or those of mmseg's EncoderDecoder.
        checkpoint: file of pre-trained weights, list of several (``.index.json``), or ``package://NAME``; ``None`` for
            random ones.
        sha256: what the file's SHA-256 has to be, or begin with (8 digits at least); ``None`` for whatever it is.
        keep_head: whether the head comes from the checkpoint too, instead of being drawn anew.
        normalize: how the backbone wants images normalised: "imagenet", "inception", "clip", "none", or ``dict(mean=,
            std=)`` of red, green and blue where white is 1. ``None``: as the data say.
    """

    name: str
    num_classes: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    sha256: str | None = None
    keep_head: bool = False
    normalize: str | dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """Stage 1.

    Attributes:
        preset: name of a set of values for the keys below, from ``SENSITIVITY_PRESETS``. None of them may be given
            another value beside it.
        num_samples: how many training samples are scored.
        sample_order: which ones: "random", a seeded choice among all; "epoch", those that a shuffled epoch begins with,
            for which few shards are read; or "file", the first (all, where there are fewer).
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


SAMPLE_ORDERS = ("random", "epoch", "file")
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
        mixup, cutmix: alpha of mixing each image with another of its rank's batch, by MixUp or CutMix (of both, each
            step draws one); 0 for neither.
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
    mixup: float = 0.0
    cutmix: float = 0.0
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
