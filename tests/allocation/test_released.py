"""The published code's allocation, against the same written down from its description with ordinary autograd."""

import math
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import Plan, Scores, UserError, allocate, estimate_sensitivity
from spt_dist.allocation.released import TAUS, eligible_names, highest_scores, matrix_names
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, get_rank, shard_bounds, world_size
from tests.ranks import run_ranks
from tests.scores_for_tests import make_info

Chosen = dict[str, list[int] | str]


def published_scores(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Sum over batches of the squared gradient of each one's mean loss, in fp32, with q, k and v as separate layers."""
    model.train()
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for images, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad**2
    model.zero_grad()
    split: dict[str, Tensor] = {}
    for name in sums:
        if name.endswith("qkv.weight"):
            weights, biases = (sums[name.removesuffix("weight") + kind].chunk(3) for kind in ("weight", "bias"))
            for letter, weight, bias in zip("qkv", weights, biases, strict=True):
                split[name.replace("qkv", letter)] = weight
                split[name.replace("qkv.weight", f"{letter}.bias")] = bias
        elif not name.endswith("qkv.bias"):
            split[name] = sums[name]
    return split


def published_choice(scores: dict[str, Tensor], budget: int, rank: int, structured_only: bool = False) -> Chosen | None:
    """Section by section: eligible names, sweep, thresholds by name, the configuration nearest to the budget.

    Returns:
        Name -> "lora", "whole" or the flat positions of single weights; ``None`` if the sweep stores nothing.
    """
    words = ("head", "cls_token", "patch_embed", "pos_embed")
    eligible = {name: value for name, value in scores.items() if not any(word in name for word in words)}
    flat = torch.cat([value.flatten() for value in eligible.values()])
    stored: Chosen | None = None
    best = 0
    for step in range(1, 80):
        tau = math.ceil(step * 0.02 * 1e6)
        if tau > len(flat):
            break
        mask = torch.zeros(len(flat))
        mask[flat.topk(tau).indices] = 1
        chosen, total = choose_by_name(eligible, mask, rank, structured_only)
        total += scores["cls_token"].numel()
        if abs(total - budget) <= abs(best - budget):
            stored, best = chosen, total
    return stored


def choose_by_name(
    eligible: dict[str, Tensor], mask: Tensor, rank: int, structured_only: bool = False
) -> tuple[Chosen, int]:
    """What is tuned of the weights in ``mask``, and its cost without cls_token."""
    chosen: Chosen = {}
    total = 0
    for (name, value), part in zip(eligible.items(), mask.split([v.numel() for v in eligible.values()]), strict=True):
        count = int(part.sum())
        if any(word in name for word in ("norm", "bias")):
            whole, cost = value.ndim == 1 and count >= len(value) / 5, value.numel()
        else:
            assert any(word in name for word in (".q.", ".k.", ".v.", "proj", "fc"))
            cost = rank * sum(value.shape)
            whole = count >= cost / 10
        if whole:
            chosen[name] = "lora" if value.ndim == 2 else "whole"
            total += cost
        elif count and not structured_only:
            chosen[name] = part.nonzero().flatten().tolist()
            total += count
    return chosen, total


def what(plan: Plan) -> Chosen:
    """A plan in the form of ``published_choice``."""
    single: Chosen = {name: indices.tolist() for name, indices in plan.sparse.items()}
    return dict(plan.matrices) | dict.fromkeys(plan.vectors, "whole") | single


def make_task(seed: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A thin ViT of 446,976 eligible weights with drop-path, and four batches of 32 images."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, drop_path_rate=0.1, **sizes)
    # Different from image to image in colour, so that there is something to learn.
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    images += torch.randn(10, 3, 1, 1)[labels]
    return model, list(zip(images.split(32), labels.split(32), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_published_sets_index_for_index(seed: int) -> None:
    model, batches = make_task(seed)
    torch.manual_seed(0)
    wanted = published_scores(model, batches)
    torch.manual_seed(0)
    scores = estimate_sensitivity(model, batches, F.cross_entropy, criterion="batch", train_mode=True)
    # Not only the sets: every score is rounded as there.
    assert all(torch.equal(scores[name], wanted[name]) for name in eligible_names(scores.names))
    kinds = set()
    for budget in (40_000, 60_000, 100_000):
        chosen = published_choice(wanted, budget, rank=8)
        assert chosen is not None
        plan = allocate(scores, budget=budget, preset="released")
        assert what(plan) == chosen, budget
        assert plan.parameters == ["cls_token"]
        kinds |= {value if isinstance(value, str) else "single" for value in chosen.values()}
    assert kinds == {"lora", "whole", "single"}


SHAPES = {
    "cls_token": (1, 1, 40),
    "pos_embed": (1, 9, 40),
    "patch_embed.proj.weight": (40, 3, 2, 2),
    "blocks.0.norm1.weight": (40,),
    "blocks.0.norm1.bias": (40,),
    "blocks.0.attn.q.weight": (300, 200),
    "blocks.0.attn.q.bias": (300,),
    "blocks.0.attn.proj.weight": (200, 300),
    "blocks.0.mlp.fc1.weight": (400, 200),
    "blocks.0.mlp.fc1.bias": (400,),
    "norm.weight": (40,),
}
INDEX = FlatIndex(tuple(SHAPES), tuple(SHAPES.values()))
ELIGIBLE = {name: shape for name, shape in SHAPES.items() if not name.startswith(("cls", "pos", "patch"))}
INFO = make_info(
    criterion="batch",
    loss_reduction="mean",
    num_samples=512,
    train_mode=True,
    always_tuned={"cls_token": [1, 1, 40]},
    matrices=[name for name, shape in ELIGIBLE.items() if len(shape) == 2],
    backbone_size=INDEX.total,
)


def make_values(seed: int, levels: int | None = None) -> Tensor:
    """Random scores whose sizes differ from tensor to tensor; rounded to some ``levels`` many of them are equal."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.rand(size, generator=generator) ** 4 * torch.rand((), generator=generator)
        for size in map(prod, SHAPES.values())
    ]
    values = torch.cat(parts)
    return values if levels is None else (values * levels).round() / levels


def make_scores(values: Tensor, **changes: Any) -> Scores:
    """This rank's part of the scores."""
    start, stop = shard_bounds(INDEX.total, world_size(), get_rank())
    return Scores(ScoreShard(INDEX, start, values[start:stop].clone()), replace(INFO, **changes))


def named(values: Tensor) -> dict[str, Tensor]:
    """The scores as separate tensors."""
    parts = values.split([prod(shape) for shape in SHAPES.values()])
    return {name: part.view(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(500, 60_000), st.integers(1, 12), st.booleans())
def test_the_sweep_stores_what_the_published_one_does(seed: int, budget: int, rank: int, structured_only: bool) -> None:
    values = make_values(seed)
    chosen = published_choice(named(values), budget, rank, structured_only)
    options: dict[str, Any] = {"rank": rank, "unstructured": not structured_only, "preset": "released"}
    if chosen is None:
        with pytest.raises(UserError, match="takes nothing above twice the budget"):
            allocate(make_scores(values), budget=budget, **options)
    else:
        assert what(allocate(make_scores(values), budget=budget, **options)) == chosen


def test_the_steps_of_the_sweep() -> None:
    assert (len(TAUS), TAUS[0], TAUS[-1]) == (79, 20_000, 1_580_000)
    assert {tau for tau in TAUS if tau % 20_000} == {700_001, 820_001, 1_140_001, 1_400_001}


def test_the_nearest_total_is_taken_also_above_the_budget() -> None:
    scores = make_scores(make_values(3))
    totals = sorted({allocate(scores, tau=tau, preset="released").num_trainable for tau in TAUS if tau <= 200_000})
    low, high = totals[:2]
    assert allocate(scores, budget=high - 1, preset="released").num_trainable == high
    assert allocate(scores, budget=(low + high) // 2 + 1, preset="released").num_trainable == high
    assert allocate(scores, budget=(low + high) // 2 - 1, preset="released").num_trainable == low
    share = (high - 0.5) / INDEX.total
    assert allocate(scores, budget=share, preset="released").num_trainable == high


def test_equal_distances_go_to_the_larger_number_and_twice_the_budget_is_the_limit() -> None:
    """On one matrix without a module every step of the sweep costs 20,000 more."""
    index = FlatIndex(("attn.q.weight",), ((300, 400),))
    info = replace(INFO, matrices=["attn.q.weight"], backbone_size=index.total + 40)
    scores = Scores(ScoreShard(index, 0, torch.rand(index.total)), info)

    def found(budget: int) -> int:
        return allocate(scores, budget=budget, structured=None, preset="released").num_trainable

    assert [found(30_039), found(30_040), found(49_000)] == [20_040, 40_040, 40_040]
    assert found(120_000) == 120_040
    assert found(10_020) == 20_040
    with pytest.raises(UserError, match=r"20,000 sensitive weights, makes 20,040 trainable.*give at least 10,020"):
        found(10_019)


def test_tau_without_a_sweep_keeps_names_and_rules() -> None:
    values = make_values(1)
    eligible = {name: value for name, value in named(values).items() if name in ELIGIBLE}
    flat = torch.cat([value.flatten() for value in eligible.values()])
    for tau in (0, 1, 777, 30_001, len(flat)):
        mask = torch.zeros(len(flat))
        mask[flat.topk(tau).indices] = 1
        chosen, total = choose_by_name(eligible, mask, rank=8)
        plan = allocate(make_scores(values), tau=tau, preset="released")
        assert what(plan) == chosen
        assert plan.num_trainable == total + 40
        assert (plan.options["preset"], plan.options["tau"]) == ("released", tau)


def test_single_weights_only() -> None:
    values = make_values(2)
    plan = allocate(make_scores(values), tau=30_000, structured=None, preset="released")
    assert not plan.matrices
    assert plan.vectors
    assert plan.options["tau"] == 30_000


def test_names() -> None:
    names = ["cls_token", "blocks.0.norm1.weight", "blocks.0.attn.q_norm.weight", "blocks.0.attn.q.weight"]
    assert eligible_names([*names, "head.fc.weight", "patch_embed.norm.weight", "pos_embed"]) == names[1:]
    assert matrix_names(names[1:], names) == {"blocks.0.attn.q.weight"}
    for unknown in ("blocks.0.ls1.gamma", "reg_token", "layers.1.downsample.reduction.weight"):
        with pytest.raises(UserError, match=f"has no rule for {unknown};"):
            matrix_names([*names[1:], unknown], names)
    # A convolution called fc1 can't have a module either.
    with pytest.raises(UserError, match=r"no rule for a\.mlp\.fc1\.weight, b\.mlp\.fc1\.weight;"):
        matrix_names(["a.mlp.fc1.weight", "norm.weight", "b.mlp.fc1.weight"], [])
    with pytest.raises(UserError, match="p0, p1, p2, p3, p4 and 3 more;"):
        matrix_names([f"p{number}" for number in range(8)], [])


def test_small_models_have_no_sweep() -> None:
    index = FlatIndex(("norm.weight",), ((500,),))
    scores = Scores(ScoreShard(index, 0, torch.rand(500)), replace(INFO, matrices=[], always_tuned={}))
    with pytest.raises(UserError, match=r"tries 20,000 sensitive weights and more, but this model has 500 to choose"):
        allocate(scores, budget=100, preset="released")
    assert allocate(scores, tau=200, preset="released").vectors == ["norm.weight"]


def choose_on_ranks(levels: int | None) -> list[Chosen]:
    """The plans for some budgets and for one number of weights, from scores that are spread over the ranks."""
    scores = make_scores(make_values(7, levels))
    # What the sweep looks at: of each tensor the scores that reach the lowest of the highest.
    highest = highest_scores(scores.shard, 40_000)
    lowest = torch.cat([scores[name].flatten() for name in SHAPES]).topk(40_000).values[-1]
    for name in SHAPES:
        assert torch.equal(highest.gather(name), scores[name][scores[name] >= lowest]), name
    plans = [allocate(scores, budget=budget, preset="released") for budget in (15_000, 30_000)]
    plans.append(allocate(scores, tau=12_345, preset="released"))
    return [what(plan) for plan in plans]


@pytest.mark.distributed
@pytest.mark.parametrize("levels", [None, 50])
def test_every_world_size_makes_the_same_plan(levels: int | None) -> None:
    one = choose_on_ranks(levels)
    for number in (2, 3):
        for chosen in run_ranks(choose_on_ranks, number, levels):
            assert chosen == one


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.sampled_from([20, 50, 1000]))
def test_equal_scores_are_taken_in_order(seed: int, levels: int) -> None:
    values = make_values(seed, levels)
    eligible = {name: value for name, value in named(values).items() if name in ELIGIBLE}
    flat = torch.cat([value.flatten() for value in eligible.values()])
    taus = [tau for tau in TAUS if tau <= len(flat)]
    order = flat.sort(descending=True, stable=True).indices
    totals = []
    for tau in taus:
        mask = torch.zeros(len(flat))
        mask[order[:tau]] = 1
        totals.append((choose_by_name(eligible, mask, rank=8), tau))
    (chosen, cost), tau = totals[len(totals) // 2]
    plan = allocate(make_scores(values), budget=cost + 40, preset="released")
    last = max(tau for (_, other), tau in totals if other == cost)
    assert plan.options["tau"] == last
    assert plan.num_trainable == cost + 40
    if last == tau:
        assert what(plan) == chosen
