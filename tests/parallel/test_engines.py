"""The engines against a plain training loop in one process."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from spt_dist import Plan, UserError, inject, trainable_parameters
from spt_dist.data.loader import load_batches
from spt_dist.data.task import Task
from spt_dist.models.classifier import create_model
from spt_dist.models.matrices import take_inventory
from spt_dist.models.sharded import whole_value
from spt_dist.parallel.backbone import build_backbone, partition, shard, training_form
from spt_dist.parallel.checkpoints import load_checkpoint
from spt_dist.parallel.engines import Engine, OptimizerSettings, build_engine
from spt_dist.sections import EngineConfig, LogConfig, ModelConfig, RunConfig, TrainConfig
from spt_dist.training.metrics import read_metrics
from spt_dist.training.trainer import Trainer
from spt_dist.tuning.inject import install, make_modules
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import make_samples, make_vit
from tests.ranks import run_ranks
from tests.tuning.plans_for_tests import random_plan

CPU = torch.device("cpu")
KINDS = ("adapter", "lora", "prompt")
SETTINGS = OptimizerSettings(lr=1e-2, weight_decay=0.1, clip_norm=0.5)
# 22 samples in batches of 8: the last batch of an epoch divides neither by 4 ranks nor by 8.
EPOCHS = 17
TRAIN = TrainConfig(epochs=EPOCHS, batch_size=8, lr=1e-2, weight_decay=0.1, clip_norm=0.5, checkpoint_interval=16)
DDP, FSDP = EngineConfig(type="ddp"), EngineConfig(type="fsdp")
ZERO = [EngineConfig(type="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)]
ENGINES = [DDP, FSDP, *ZERO]
CASES = [(engine, world_size, 1) for world_size in (1, 2, 4) for engine in ENGINES] + [
    (replace(FSDP, shard_size=1), 2, 1),
    (replace(FSDP, shard_size=2), 4, 1),
    (replace(ZERO[2], offload=True), 2, 1),
    (replace(ZERO[3], offload=True), 2, 1),
    *((engine, 2, 3) for engine in (DDP, FSDP, ZERO[0], ZERO[2], ZERO[3], replace(ZERO[2], offload=True))),
    *((replace(engine, activation_checkpointing=True), 2, 1) for engine in (DDP, FSDP, ZERO[3])),
]


def name_of(case: object) -> str:
    """Of an engine, without what is at its default."""
    if not isinstance(case, EngineConfig):
        return str(case)
    words = [f"{case.type}{case.zero_stage if case.type == 'deepspeed' else ''}"]
    keys = [key for key in asdict(case) if key not in ("type", "zero_stage")]
    words += [f"{key}={getattr(case, key)}" for key in keys if getattr(case, key) != getattr(DDP, key)]
    return " ".join(words)


def make_task() -> Task:
    """22 training and 9 held-out random images."""
    return Task(TensorDataset(*make_samples(22)), TensorDataset(*make_samples(9, seed=1)), 22, 9, 10)


def make_config(engine: EngineConfig, folder: str, **train: Any) -> RunConfig:
    """The config of a run; its model and its data are given otherwise."""
    return RunConfig(
        model=ModelConfig(name="vit", num_classes=10),
        data={"type": "random"},
        method={"type": "random"},
        train=replace(TRAIN, **train),
        engine=engine,
        log=LogConfig(backends=[]),
        seed=5,
        work_dir=folder,
    )


def spread(model: nn.Module, config: EngineConfig, train_all: bool) -> None:
    """Put a model into the form that the engine trains."""
    if training_form(config) == "fsdp":
        shard(model, config.shard_size, CPU, train_all)
    elif training_form(config) == "zero3":
        partition(model, config)


def make_engine(
    config: EngineConfig, plan: str = "random", model_seed: int = 0, accumulation: int = 1, inject_first: bool = False
) -> Engine:
    """An engine around a tuned model whose trained parameters do not depend on anything else drawn."""
    model = make_vit().requires_grad_(plan == "full")
    if not inject_first:
        spread(model, config, plan == "full")
    chosen = make_plan("full", make_vit()) if plan == "full" else random_plan(make_vit(), 3, KINDS)
    torch.manual_seed(model_seed)
    inject(model, chosen)
    if inject_first:
        spread(model, config, plan == "full")
    return build_engine(config, model, replace(SETTINGS, accumulation=accumulation), CPU)


def make_trainer(engine: Engine, config: EngineConfig, folder: str, **train: Any) -> Trainer:
    """A trainer of the task above."""
    return Trainer(engine, make_task(), make_config(config, folder, **train), CPU)


def train(
    config: EngineConfig, folder: str, accumulation: int = 1, plan: str = "random", inject_first: bool = False
) -> dict[str, Any]:
    """Train all epochs; what came of it."""
    engine = make_engine(config, plan, accumulation=accumulation, inject_first=inject_first)
    frozen = {n: whole_value(p).clone() for n, p in engine.module.named_parameters() if not p.requires_grad}
    top1 = make_trainer(engine, config, folder, accumulation=accumulation).fit()["top1"]
    for name, parameter in engine.module.named_parameters():
        assert parameter.requires_grad or torch.equal(whole_value(parameter), frozen[name]), name
    return {"top1": top1, "state": engine.gather_state()}


def read_losses(folder: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@cache
def plain_loop(plan: str = "random") -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """The same training written down without any of our training code: whole batches, mean loss, torch's AdamW.

    Losses, trained values, and their moving averages with a decay of 0.9.
    """
    model = make_vit()
    chosen = make_plan("full", model) if plan == "full" else random_plan(model, 3, KINDS)
    torch.manual_seed(0)
    model = inject(model, chosen)
    images, labels = make_samples(22)
    named = dict(trainable_parameters(model))
    matrices = [parameter for parameter in named.values() if parameter.ndim == 2]
    others = [parameter for parameter in named.values() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * 3 - 1, eta_min=1e-5)
    losses = []
    averages = {name: parameter.detach().clone() for name, parameter in named.items()}
    for epoch in range(EPOCHS):
        order = torch.randperm(22, generator=torch.Generator().manual_seed(5 * 1_000_003 + epoch))
        for batch in order.split(8):
            model.train()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
            optimizer.step()
            cosine.step()
            losses.append(loss.item())
            averages = {name: 0.9 * averages[name] + 0.1 * parameter.detach() for name, parameter in named.items()}
    return losses, {name: parameter.detach() for name, parameter in named.items()}, averages


def check_run(results: list[dict[str, Any]], folder: Path, plan: str = "random") -> None:
    """A run is the plain loop's, every trained tensor had gradients, and the last two checkpoints are there."""
    losses, parameters, _ = plain_loop(plan)
    assert len(losses) == 51
    assert read_losses(folder) == pytest.approx(losses, rel=1e-4, abs=1e-5)
    state = results[0]["state"]
    for name, value in parameters.items():
        # Attention does not depend on the keys' bias: its gradient is rounding, which Adam makes steps of.
        if not name.endswith("qkv.bias"):
            assert torch.allclose(state[f"param/{name}"], value, rtol=1e-3, atol=1e-3), name
        assert state[f"exp_avg/{name}"].isfinite().all() and state[f"exp_avg/{name}"].any(), name
    assert [len(result["state"]) > 0 for result in results] == [True] + [False] * (len(results) - 1)
    assert len({result["top1"] for result in results}) == 1
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000051.safetensors"
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2


@dataclass(frozen=True)
class Run:
    """A finished run: its work dir, and what ``train`` returned on each rank."""

    folder: Path
    results: list[dict[str, Any]]


MakeRun = Callable[[EngineConfig, int, int, str], Run]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """A run of an engine, made once for all tests that look at it."""

    @cache
    def make(engine: EngineConfig, world_size: int, accumulation: int, plan: str) -> Run:
        folder = tmp_path_factory.mktemp("run")
        return Run(folder, run_ranks(train, world_size, engine, str(folder), accumulation, plan))

    return make


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "world_size", "accumulation"), CASES, ids=name_of)
def test_every_engine_follows_the_plain_loop(
    make_run: MakeRun, engine: EngineConfig, world_size: int, accumulation: int
) -> None:
    run = make_run(engine, world_size, accumulation, "random")
    check_run(run.results, run.folder)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", [DDP, FSDP, ZERO[2], ZERO[3]], ids=name_of)
def test_full_fine_tuning_follows_the_plain_loop(make_run: MakeRun, engine: EngineConfig) -> None:
    run = make_run(engine, 2, 1, "full")
    check_run(run.results, run.folder, "full")


@pytest.mark.distributed
@pytest.mark.parametrize("engine", [FSDP, ZERO[3]], ids=name_of)
def test_a_model_may_be_injected_before_it_is_spread(tmp_path: Path, engine: EngineConfig) -> None:
    check_run(run_ranks(train, 2, engine, str(tmp_path), 1, "random", True), tmp_path)


def train_compiled(config: EngineConfig, folder: str) -> None:
    """One epoch."""
    make_trainer(make_engine(config), config, folder, epochs=1).fit()


@pytest.mark.distributed
@pytest.mark.parametrize("engine", [DDP, FSDP], ids=name_of)
def test_compiled_blocks_compute_the_same(tmp_path: Path, engine: EngineConfig) -> None:
    losses = []
    for backend in (None, "eager"):
        folder = tmp_path / str(backend)
        run_ranks(train_compiled, 1, replace(engine, compile=backend), str(folder), timeout=300)
        losses.append(read_losses(folder))
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def resume(config: EngineConfig, checkpoint: str, folder: str, plan: str) -> None:
    """Go on from a checkpoint with an engine whose trained parameters have been thrown away."""
    engine = make_engine(config, plan, model_seed=99)
    with torch.no_grad():
        for _, parameter in trainable_parameters(engine.module):
            parameter.add_(1)
    trainer = make_trainer(engine, config, folder)
    trainer.resume(load_checkpoint(Path(checkpoint)))
    assert trainer.progress.num_steps == 48
    trainer.fit()


MOVES = [(engine, 2, engine, 2, "random") for engine in ENGINES] + [
    (DDP, 2, FSDP, 4, "random"),
    (DDP, 2, ZERO[2], 1, "random"),
    (FSDP, 2, ZERO[3], 4, "random"),
    (FSDP, 2, ZERO[1], 2, "random"),
    (ZERO[0], 2, ZERO[3], 2, "random"),
    (ZERO[1], 2, FSDP, 2, "random"),
    (ZERO[2], 2, DDP, 1, "random"),
    (ZERO[3], 2, ZERO[0], 1, "random"),
    (ZERO[3], 2, FSDP, 2, "random"),
    (FSDP, 2, ZERO[3], 4, "full"),
    (ZERO[3], 2, FSDP, 4, "full"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("writer", "writers", "reader", "readers", "plan"), MOVES, ids=name_of)
def test_checkpoints_move_between_engines_and_world_sizes(
    tmp_path: Path,
    make_run: MakeRun,
    writer: EngineConfig,
    writers: int,
    reader: EngineConfig,
    readers: int,
    plan: str,
) -> None:
    first = make_run(writer, writers, 1, plan).folder
    (tmp_path / "metrics.jsonl").write_bytes((first / "metrics.jsonl").read_bytes())
    checkpoint = str(first / "checkpoints" / "step-00000048.safetensors")
    run_ranks(resume, readers, reader, checkpoint, str(tmp_path), plan)
    same_setup = (writer, writers) == (reader, readers)
    losses = read_losses(first)
    assert read_losses(tmp_path) == (losses if same_setup else pytest.approx(losses, rel=1e-4, abs=1e-5))
    if same_setup:
        name = "checkpoints/step-00000051.safetensors"
        expected, found = load_file(first / name), load_file(tmp_path / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def three_losses(config: EngineConfig) -> list[float]:
    """The losses of three steps on the same batch."""
    engine = make_engine(config)
    images, labels = make_samples(8)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(engine(images).float(), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert all(parameter.dtype == torch.float32 for _, parameter in trainable_parameters(engine.module))
    return losses


AUTOCAST = [
    *(replace(engine, amp=True) for engine in ENGINES),
    *(replace(engine, amp=True, amp_dtype="float16") for engine in (DDP, FSDP)),
    *(replace(engine, amp=True, frozen_dtype="bfloat16") for engine in (DDP, FSDP, ZERO[2])),
]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", AUTOCAST, ids=name_of)
def test_autocast_is_close_to_full_precision(engine: EngineConfig) -> None:
    rounded = run_ranks(three_losses, 2, engine)[0]
    full = run_ranks(three_losses, 1, DDP)[0]
    assert rounded == pytest.approx(full, rel=0.03)
    assert rounded != full


def train_on_nan(config: EngineConfig, accumulation: int) -> str:
    """A run whose data hold a NaN; the error, once the parameters are found untouched."""
    images, labels = make_samples(22)
    images[4] = float("nan")
    engine = make_engine(config, accumulation=accumulation)
    trainer = make_trainer(engine, config, "unused", accumulation=accumulation)
    task = replace(make_task(), train=TensorDataset(images, labels))
    try:
        for batch in load_batches(task.train, trainer.batches.epoch(), CPU):
            before = {name: value.clone() for name, value in engine.trained()}
            trainer.train_step(batch, 1e-2)
    except UserError as error:
        assert all(torch.equal(value, before[name]) for name, value in engine.trained())
        return str(error)
    return "no error"


@pytest.mark.distributed
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("engine", [DDP, FSDP, ZERO[2], ZERO[3]], ids=name_of)
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_step(engine: EngineConfig, accumulation: int) -> None:
    order = torch.randperm(22, generator=torch.Generator().manual_seed(5 * 1_000_003)).tolist()
    step, place = divmod(order.index(4), 8)
    wanted = f"the loss is nan at step {step} (rate 1.00e-02), of training samples (rank {place % 2}: 4); "
    for message in run_ranks(train_on_nan, 2, engine, accumulation):
        assert message.startswith(wanted)


def train_averaged(config: EngineConfig, folder: str, resume_at: int | None) -> dict[str, Tensor]:
    """A run with a moving average; from a checkpoint's if wanted. What the task file would hold."""
    engine = make_engine(config)
    trainer = make_trainer(engine, config, folder, ema=0.9, checkpoint_interval=8)
    if resume_at is not None:
        trainer.resume(load_checkpoint(Path(folder, "checkpoints", f"step-{resume_at:08d}.safetensors")))
    trainer.fit()
    return trainer.trained_values()


@pytest.mark.distributed
@pytest.mark.parametrize("engine", [DDP, FSDP, ZERO[2]], ids=name_of)
def test_moving_average(tmp_path: Path, engine: EngineConfig) -> None:
    found = run_ranks(train_averaged, 2, engine, str(tmp_path), None)[0]
    for name, value in plain_loop()[2].items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-3), name
    again = run_ranks(train_averaged, 2, engine, str(tmp_path), 48)[0]
    assert all(torch.equal(again[name], value) for name, value in found.items())


def overflow(config: EngineConfig) -> tuple[bool, float, float]:
    """One good step with float16, and one whose gradients overflow: whether that was left out, and the scales."""
    engine = make_engine(config)
    images, labels = make_samples(8)
    for factor in (1.0, 1e30):
        before = {name: value.clone() for name, value in engine.trained()}
        scale = float(engine.scaler.get_scale())  # type: ignore[attr-defined]
        engine.backward(F.cross_entropy(engine(images).float(), labels) * factor)
        norm = engine.step()
    untouched = all(torch.equal(value, before[name]) for name, value in engine.trained())
    assert engine.skips_overflow and not math.isfinite(norm)
    state = engine.gather_state()
    if not state:
        return untouched, scale, float("nan")
    assert float(state["optimizer/step"]) == 1
    other = make_engine(config)
    other.load_state(state)
    return untouched, scale, float(other.scaler.get_scale())  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", [DDP, FSDP], ids=name_of)
def test_a_step_that_overflows_in_float16_is_left_out(engine: EngineConfig) -> None:
    """And the halved scale goes with the checkpoint."""
    untouched, before, after = run_ranks(overflow, 1, replace(engine, amp=True, amp_dtype="float16"))[0]
    assert untouched
    assert after == before / 2


def train_some_in_place(config: EngineConfig, folder: str) -> tuple[list[float], list[torch.dtype], float]:
    """A plan that trains parts of the backbone in place, on a backbone that is built for it."""
    spared = ["blocks.0.norm1.weight", "blocks.1.attn.proj.weight"]
    name, kwargs = (
        "vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    )
    plain = create_model(name, 10, kwargs, torch.device("meta"))
    inventory = take_inventory(plain)
    names = [*inventory.always_tuned, *spared]
    shapes = {name: tuple(plain.get_parameter(name).shape) for name in names}
    plan = Plan(parameters=names, head=inventory.head, shapes=shapes, backbone_size=inventory.backbone_size)
    model = ModelConfig(name=name, num_classes=10, kwargs=kwargs)
    backbone = build_backbone(model, config, training_form(config), 3, CPU, plan)
    tuned = install(backbone.model, plan, make_modules(backbone.model, plan), backbone.fingerprint)
    engine = build_engine(config, tuned, SETTINGS, CPU)
    make_trainer(engine, config, folder, epochs=2).fit()["top1"]
    dtypes = [engine.module.get_parameter(name).dtype for name in (*spared, "blocks.0.attn.proj.weight")]
    return read_losses(Path(folder)), dtypes, sum(float(value.abs().sum()) for _, value in engine.trained())


@pytest.mark.distributed
@pytest.mark.parametrize("engine", [FSDP, ZERO[3], replace(FSDP, amp=True, frozen_dtype="bfloat16")], ids=name_of)
def test_parts_of_the_backbone_may_be_trained_in_place(tmp_path: Path, engine: EngineConfig) -> None:
    """They stay fp32, and under FSDP2 whole."""
    wanted = run_ranks(train_some_in_place, 2, DDP, str(tmp_path / "ddp"))[0]
    found = run_ranks(train_some_in_place, 2, engine, str(tmp_path / "other"))[0]
    tolerance = 0.02 if engine.amp else 1e-4
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[2] == pytest.approx(wanted[2], rel=tolerance)
    assert found[1] == [torch.float32, torch.float32, torch.bfloat16 if engine.amp else torch.float32]


def never_finite(config: EngineConfig, folder: str) -> tuple[str, int]:
    """A float16 run whose gradient is NaN for good: the error, and the steps until then."""
    engine = make_engine(config)
    engine.module.get_parameter("head.weight").register_hook(lambda gradient: gradient * float("nan"))
    trainer = make_trainer(engine, config, folder)
    with pytest.raises(UserError) as caught:
        trainer.fit()
    return str(caught.value), trainer.progress.num_steps


def test_float16_that_never_gets_a_finite_gradient_ends(tmp_path: Path) -> None:
    message, steps = run_ranks(never_finite, 1, replace(DDP, amp=True, amp_dtype="float16"), str(tmp_path))[0]
    assert message.startswith("the norm of the gradient is nan at step 16")
    # The scale begins at 2^16 and is halved each time.
    assert steps == 16
