"""Plans against the definition: global top-k, then the threshold of each tensor."""

from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from spt_dist import Plan, Scores, UserError, allocate, estimate_sensitivity
from spt_dist.files import save_tensors
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard
from tests.models_for_tests import make_samples, make_vit
from tests.ranks import run_ranks
from tests.scores_for_tests import make_info

SHAPES = {"x.weight": (8, 6), "x.bias": (8,), "norm.weight": (6,), "y.weight": (20, 10), "y.bias": (20,)}
INDEX = FlatIndex(tuple(SHAPES), tuple(SHAPES.values()))
BACKBONE = 400


def make_scores(values: Tensor | None = None, cls_token: int = 5) -> Scores:
    """Scores of two matrices, two biases and a norm; ``cls_token`` weights are always tuned."""
    values = torch.rand(INDEX.total).exp() if values is None else values
    always = {"cls_token": [1, 1, cls_token]} if cls_token else {}
    info = make_info(always_tuned=always, matrices=["x.weight", "y.weight"], backbone_size=BACKBONE)
    return Scores(ScoreShard(INDEX, 0, values), info)


def by_definition(scores: Scores, tau: int, rank: int, alpha: float, beta: float | None) -> dict[str, tuple[str, int]]:
    """Name -> how it is tuned and what that costs, from ``torch.topk`` over all scores."""
    flat = torch.cat([scores[name].flatten() for name in scores.names])
    chosen = torch.zeros_like(flat)
    chosen[flat.topk(tau).indices] = 1
    result = {}
    for name, part in zip(SHAPES, chosen.split([prod(shape) for shape in SHAPES.values()]), strict=True):
        shape, count = SHAPES[name], int(part.sum())
        lora = rank * sum(shape)
        if count and len(shape) == 2 and count >= lora / alpha:
            result[name] = ("structured", lora)
        elif count and len(shape) == 1 and beta is not None and count >= shape[0] / beta:
            result[name] = ("vector", shape[0])
        elif count:
            result[name] = ("sparse", count)
    return result


def what(plan: Plan) -> dict[str, tuple[str, int]]:
    """A plan in the form of ``by_definition``."""
    result = {name: ("structured", plan.rank * sum(SHAPES[name])) for name in plan.matrices}
    result |= {name: ("vector", prod(SHAPES[name])) for name in plan.vectors}
    return result | {name: ("sparse", len(indices)) for name, indices in plan.sparse.items()}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, INDEX.total),
    st.integers(1, 3),
    st.sampled_from([1.0, 2.5, 10.0]),
    st.sampled_from([None, 1.0, 5.0]),
    st.integers(0, 100),
)
def test_tau_gives_the_plan_of_the_definition(tau: int, rank: int, alpha: float, beta: float | None, seed: int) -> None:
    torch.manual_seed(seed)
    scores = make_scores()
    plan = allocate(scores, tau=tau, rank=rank, alpha=alpha, beta=beta)
    wanted = by_definition(scores, tau, rank, alpha, beta)
    assert what(plan) == wanted
    assert plan.num_trainable == 5 + sum(cost for _, cost in wanted.values())
    for name, indices in plan.sparse.items():
        assert set(indices.tolist()) == set(scores[name].flatten().topk(len(indices)).indices.tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(6, BACKBONE), st.sampled_from([1.0, 10.0]), st.sampled_from([None, 5.0]), st.integers(0, 100))
def test_budget_is_never_exceeded_and_one_more_weight_would(
    budget: int, alpha: float, beta: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    scores = make_scores()
    plan = allocate(scores, budget=budget, rank=2, alpha=alpha, beta=beta)
    assert plan.num_trainable <= budget
    tau = plan.options["tau"]
    if tau < INDEX.total:
        more = by_definition(scores, tau + 1, 2, alpha, beta)
        assert 5 + sum(cost for _, cost in more.values()) > budget


def test_alpha_1_never_costs_more_than_the_sensitive_weights() -> None:
    for tau in range(0, INDEX.total, 7):
        assert allocate(make_scores(), tau=tau, rank=2).num_trainable <= tau + 5


def test_switching_parts_off() -> None:
    scores = make_scores()
    assert not allocate(scores, tau=200, structured=None).matrices
    only = allocate(scores, tau=250, rank=1, unstructured=False)
    assert only.matrices
    assert not only.sparse


def test_the_papers_preset_overrides_alpha_and_beta() -> None:
    scores = make_scores()
    plan = allocate(scores, tau=40, rank=2, alpha=10.0, beta=5.0, preset="paper")
    assert what(plan) == by_definition(scores, 40, 2, 1.0, None)


def test_a_fraction_is_of_the_backbone() -> None:
    scores = make_scores()
    plan = allocate(scores, budget=0.25, rank=1)
    assert what(plan) == what(allocate(scores, budget=100, rank=1))
    assert what(allocate(scores, budget=1.0, rank=1)) == what(allocate(scores, budget=BACKBONE, rank=1))
    assert what(allocate(scores, budget=1e2, rank=1)) == what(plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either budget"),
        ({"budget": 50, "tau": 3}, "either budget"),
        ({"budget": 0}, "budget=0: 0 parameters are not enough for cls_token's 5"),
        ({"budget": 5}, "give at least 6"),
        ({"budget": 1e-6}, "budget=1e-06"),
        ({"budget": 30.5}, "a count is a whole number"),
        ({"tau": 10.5}, "tau=10.5: has to be a whole number"),
        ({"tau": 3, "rank": "8"}, "rank='8': has to be a whole number"),
        ({"budget": BACKBONE + 1}, "above the backbone's 400 weights"),
        ({"budget": -3}, "budget=-3"),
        ({"budget": "0.4M"}, "budget='0.4M'"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"tau": INDEX.total + 1}, "tau=283"),
        ({"tau": 3, "structured": "adaptor"}, "structured='adaptor'"),
        ({"tau": 3, "init": "random"}, "init='random'"),
        ({"tau": 3, "dropout": 1.0}, "dropout=1.0"),
        ({"tau": 3, "structured": None, "unstructured": False}, "nothing to tune"),
        ({"tau": 3, "rank": 0}, "rank=0"),
        ({"tau": 3, "structured": ["lora"]}, r"structured=\['lora'\]: no such kind"),
        ({"tau": 3, "unstructured": "no"}, "unstructured='no': has to be True or False"),
        ({"tau": 3, "alpha": "10"}, "alpha='10': has to be a number of at least 1"),
        ({"tau": 3, "alpha": 0.5}, "alpha=0.5"),
        ({"tau": 3, "preset": "paper2"}, "preset='paper2'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        allocate(make_scores(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("matrices", ["a"]), ("vectors", 5), ("shapes", [1]), ("rank", "8"), ("backbone_size", "x"), ("sparse", {"a": 1})],
)
def test_damaged_plan_files_are_named(tmp_path: Path, field: str, value: object) -> None:
    tensors, metadata = allocate(make_scores(), tau=150, rank=2).to_tensors()
    save_tensors(tmp_path / "plan.safetensors", tensors, {"kind": "plan", "plan": metadata | {field: value}})
    with pytest.raises(UserError, match=rf"plan\.safetensors: the plan in this file is damaged \({field} is"):
        Plan.load(tmp_path / "plan.safetensors")


def test_plan_file_round_trip(tmp_path: Path) -> None:
    plan = allocate(make_scores(), tau=150, rank=2, beta=5)
    assert plan.matrices
    assert plan.sparse
    assert plan.vectors
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert what(again) == what(plan)
    assert again.summary() == plan.summary()
    assert all(torch.equal(again.sparse[name], indices) for name, indices in plan.sparse.items())
    (tmp_path / "plan.safetensors").write_bytes((tmp_path / "plan.safetensors").read_bytes()[:-16])
    with pytest.raises(UserError, match="truncated"):
        Plan.load(tmp_path / "plan.safetensors")


def plan_on_ranks() -> dict[str, object]:
    """Score a share of the samples and allocate."""
    import torch.distributed as dist

    images, labels = make_samples(8)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    scores = estimate_sensitivity(make_vit(), [(images[mine], labels[mine])], F.cross_entropy)
    plan = allocate(scores, budget=700, rank=2, alpha=10, beta=5)
    assert plan.num_trainable <= 700
    return {
        "matrices": plan.matrices,
        "vectors": plan.vectors,
        "sparse": {name: indices.tolist() for name, indices in plan.sparse.items()},
    }


@pytest.mark.distributed
def test_every_world_size_makes_the_same_plan() -> None:
    one = run_ranks(plan_on_ranks, 1)[0]
    assert one["matrices"]
    assert one["vectors"]
    assert one["sparse"]
    assert not any("attn.k.bias" in name for name in [*one["sparse"], *one["vectors"]])
    for world_size in (2, 4):
        for plan in run_ranks(plan_on_ranks, world_size):
            assert plan == one
