"""Counting what collectives move, against arithmetic by hand and against what the processes write to their sockets."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import _paper
from _paper import HYBRID, legs, payloads, sizes_of
from _traffic import Traffic
from spt_dist import trainable_parameters
from spt_dist.data.loader import load_batches
from spt_dist.sections import EngineConfig
from tests.models_for_tests import make_vit
from tests.parallel.test_engines import CPU, DDP, FSDP, ZERO, make_engine, make_trainer, name_of
from tests.ranks import run_ranks

SIZE = 300_000
BYTES = 4 * SIZE
ENGINES = {"ddp": DDP, "fsdp": FSDP, **{f"zero{stage}": engine for stage, engine in enumerate(ZERO)}}


def written() -> int:
    """Bytes that this process has written so far."""
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if "wchar" in line)


def collectives() -> dict[str, Callable[[], object]]:
    """Each on one million bytes and some."""
    ranks, whole = dist.get_world_size(), torch.zeros(SIZE)
    return {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, torch.zeros(SIZE // ranks)),
        "all-gather of a list": lambda: dist.all_gather(list(whole.split(SIZE // ranks)), torch.zeros(SIZE // ranks)),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(torch.zeros(SIZE // ranks), whole),
        "broadcast": lambda: dist.broadcast(whole, 1),
        "reduce": lambda: dist.reduce(whole, 1),
        "large reduce": lambda: dist.reduce(torch.zeros(6 * 2**20), 0),
    }


def count_each() -> dict[str, tuple[dict[str, int], float, float, int]]:
    """Payload, bytes in a ring, bytes with gloo, and what was written."""
    found = {}
    for name, run in collectives().items():
        dist.barrier()
        before = written()
        with Traffic() as traffic:
            run()
        found[name] = dict(traffic.payload), traffic.ring, traffic.gloo, written() - before
        dist.barrier()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_plain_collectives(ranks: int) -> None:
    results = run_ranks(count_each, ranks)
    for name, (payload, ring, gloo, _) in results[0].items():
        kind = name.removeprefix("large ").removesuffix(" of a list")
        size = 24 * 2**20 if name == "large reduce" else BYTES
        assert payload == {kind: size}, name
        assert ring == pytest.approx(size * (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)), name
        truth = sum(result[name][3] for result in results) / ranks
        assert gloo == pytest.approx(truth, rel=0.03), name


def count_functional() -> tuple[dict[str, int], float]:
    """The collectives that DTensor makes of a sum and of a gather."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    spread = distribute_tensor(torch.ones(6, 10), init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    with Traffic() as traffic:
        spread.full_tensor()
        spread.sum().full_tensor()
    return dict(traffic.payload), traffic.ring


@pytest.mark.distributed
def test_collectives_of_dtensor() -> None:
    assert run_ranks(count_functional, 2) == [({"all-gather": 240, "all-reduce": 4}, 120 + 4)] * 2


def count_small_group() -> float:
    """An all-reduce among half of the ranks."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with Traffic() as traffic:
        dist.all_reduce(torch.zeros(100), group=groups[dist.get_rank() // 2])
        dist.barrier()
    assert dict(traffic.payload) == {"all-reduce": 400}
    return traffic.ring


@pytest.mark.distributed
def test_a_group_is_as_large_as_it_is() -> None:
    assert run_ranks(count_small_group, 4) == [400.0] * 4


def count_uncounted() -> None:
    """A collective that the counter does not know."""
    with Traffic(), pytest.raises(AssertionError, match="alltoall"):
        dist.all_to_all_single(torch.zeros(4), torch.zeros(4))


@pytest.mark.distributed
def test_nothing_is_left_out_in_silence() -> None:
    run_ranks(count_uncounted, 2)


def count_wrapped(wrapper: str) -> dict[str, int]:
    """A third step of a model with 5 x 3 + 5 and 7 x 5 + 7 parameters; DDP makes up its buckets in the first two."""
    model: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    model = DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model)
    for _ in range(3):
        with Traffic() as traffic:
            model(torch.ones(2, 3)).sum().backward()
    return dict(traffic.payload)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("wrapper", "expected"),
    [
        ("ddp", {"all-reduce": 4 * (20 + 42)}),
        # Five rows become six on two ranks, seven become eight. The root stays gathered for the backward pass.
        ("fsdp", {"all-gather": 4 * (24 + 48), "reduce-scatter": 4 * (24 + 48)}),
    ],
)
def test_wrapped_models(wrapper: str, expected: dict[str, int]) -> None:
    assert run_ranks(count_wrapped, 2, wrapper) == [expected] * 2


def count_step(config: EngineConfig, plan: str, folder: str) -> tuple[dict[str, int], float, int]:
    """A third step of the trainer: payloads, bytes in rings, trained parameters."""
    engine = make_engine(config, plan)
    trainer = make_trainer(engine, config, folder)
    batch = next(iter(load_batches(trainer.task.train, trainer.batches.epoch(), CPU)))
    for _ in range(3):
        with Traffic() as traffic:
            trainer.train_step(batch, 1e-3)
    trained = sum(getattr(value, "ds_numel", value.numel()) for _, value in trainable_parameters(engine.module))
    return dict(traffic.payload), traffic.ring, trained


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "plan", "ranks"),
    [(engine, plan, 2) for engine in ENGINES for plan in ("random", "full")]
    + [(engine, plan, 4) for engine in ("fsdp", "zero2", "zero3") for plan in ("random", "full")],
)
def test_formulas_hold(tmp_path: Path, engine: str, plan: str, ranks: int) -> None:
    found, _, trained = run_ranks(count_step, ranks, ENGINES[engine], plan, str(tmp_path))[0]
    tuned, full = sizes_of(make_vit(), 0)
    sizes = full if plan == "full" else replace(tuned, trained=trained)
    expected = payloads(sizes, engine, ranks)
    assert found.keys() == expected.keys()
    for kind, size in expected.items():
        # ZeRO makes parts of one size of its groups of parameters, stage 3 of each tensor.
        slack = 300 * ranks if engine == "zero3" else 16 * ranks
        assert found[kind] == pytest.approx(size, abs=slack), kind


@pytest.mark.distributed
@pytest.mark.parametrize("plan", ["random", "full"])
def test_formula_of_shards_in_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    config = replace(FSDP, shard_size=2)
    _, ring, trained = run_ranks(count_step, 4, config, plan, str(tmp_path))[0]
    tuned, full = sizes_of(make_vit(), 0)
    sizes = full if plan == "full" else replace(tuned, trained=trained)
    monkeypatch.setattr(_paper, "NODE", 2)
    assert ring == pytest.approx(sum(legs(sizes, HYBRID, 4)), rel=0.01), name_of(config)


def test_sizes() -> None:
    tuned, full = sizes_of(make_vit(), 0.01)
    total = sum(parameter.numel() for parameter in make_vit().parameters())
    # The head: 10 classes of 24 features and their biases.
    assert full.trained == total and tuned.trained == round(0.01 * (total - 250)) + 250
    assert tuned.frozen == total - 250 - 24 and full.frozen == 0
    # pos_embed has one row, which every rank then holds in full.
    assert full.padded(1) == 4 * total
    assert full.padded(3) - 4 * total >= 4 * 2 * 5 * 24
