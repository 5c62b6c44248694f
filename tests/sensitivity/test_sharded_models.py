"""Scores of models that engines have wrapped or spread over the ranks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from spt_dist import UserError, estimate_sensitivity
from spt_dist.compat import start_deepspeed
from tests.models_for_tests import make_samples, make_vit, pick
from tests.ranks import run_ranks
from tests.sensitivity.oracle import one_by_one, relative_error

OPTIONS: dict[str, Any] = {"init_values": 0.1, "reg_tokens": 1}
# Unequal shares; the last rank of four has none at all.
SHARES = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2, 3], [4]], 4: [[0, 1], [2], [3, 4], []]}


def wrap(model: nn.Module, how: str) -> nn.Module:
    """The model as an engine would have it."""
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "compiled":
        return torch.compile(model, backend="eager")  # type: ignore[no-any-return]
    if how.startswith("fsdp"):
        if how == "fsdp, trained before":
            shard(model)
            # A step leaves whole copies behind that require gradients.
            model(make_samples(1)[0]).sum().backward()
            model.zero_grad()
            return model
        return shard(model)
    if how.startswith("zero"):
        import deepspeed

        start_deepspeed()
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}
        optimizer = torch.optim.AdamW(model.parameters())
        engine: nn.Module = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        return engine
    return model


def shard(model: nn.Module) -> nn.Module:
    """FSDP2 block by block."""
    for block in model.get_submodule("blocks").children():
        fully_shard(block)
    return fully_shard(model)


def score(how: str, shares: list[list[int]], shard_sums: bool | None) -> tuple[dict[str, Tensor], int, bool]:
    """Scores of this rank's share, their number of samples, and whether any parameter got a gradient."""
    images, labels = make_samples(5)
    mine = shares[dist.get_rank()]
    model = wrap(make_vit(**OPTIONS), how)
    before = [parameter.requires_grad for parameter in model.parameters()]
    batches = [(images[mine], labels[mine])] if mine else []
    scores = estimate_sensitivity(model, batches, F.cross_entropy, shard_sums=shard_sums)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    touched = any(parameter.grad is not None for parameter in model.parameters())
    return {name: scores[name] for name in scores.names}, scores.num_samples, touched


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("how", ["plain", "ddp", "compiled", "fsdp", "fsdp, trained before", "zero 3"])
def test_wrapped_models_score_as_plain_ones(how: str, world_size: int) -> None:
    images, labels = make_samples(5)
    wanted = one_by_one(make_vit(**OPTIONS), images, labels, F.cross_entropy)
    shard_sums = True if how in ("plain", "ddp") else None
    for scores, num_samples, touched in run_ranks(score, world_size, how, SHARES[world_size], shard_sums):
        assert num_samples == 5
        assert not touched
        assert set(scores) >= {"cls_token", "pos_embed", "reg_token", "blocks.1.ls2.gamma", "blocks.0.attn.v.weight"}
        for name, value in scores.items():
            if not name.endswith("attn.k.bias"):
                assert relative_error(value, pick(wanted, name)) < 2e-5, name


def score_within_a_limit() -> tuple[dict[str, Tensor], list[int]]:
    """Scores of an FSDP2 model with a memory limit, and the sizes of the passes."""
    images, labels = make_samples(8)
    model = shard(make_vit())
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy, memory_limit=300_000)
    return {name: scores[name] for name in scores.names}, sizes


@pytest.mark.distributed
def test_memory_limit_on_a_sharded_model() -> None:
    wanted = one_by_one(make_vit(), *make_samples(8), F.cross_entropy)
    for scores, sizes in run_ranks(score_within_a_limit, 2):
        assert sizes[:2] == [1, 1]
        assert max(sizes) < 7
        # Both ranks score the same samples.
        for name, value in scores.items():
            if not name.endswith("attn.k.bias"):
                assert relative_error(value, 2 * pick(wanted, name)) < 2e-5, name


def fail_on_rank_1(when: int, shard_sums: bool) -> str:
    """What each rank says when rank 1's batches end in an error."""
    images, labels = make_samples(6)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(3):
            if step == when and dist.get_rank() == 1:
                raise OSError("disk gone")
            yield images[2 * step : 2 * step + 2], labels[2 * step : 2 * step + 2]

    try:
        estimate_sensitivity(make_vit(), batches(), F.cross_entropy, shard_sums=shard_sums)
    except (OSError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.distributed
@pytest.mark.parametrize("shard_sums", [False, True])
@pytest.mark.parametrize("when", [0, 2])
def test_a_rank_that_fails_takes_the_others_with_it(when: int, shard_sums: bool) -> None:
    other, own = run_ranks(fail_on_rank_1, 2, when, shard_sums)
    assert own == "OSError: disk gone"
    assert other == "OtherRankFailed: rank 1 failed: OSError: disk gone"
