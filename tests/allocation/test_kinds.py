"""Kinds of structured modules: their costs against the modules made, and plans with them against the definition."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional as F

from spt_dist import Plan, Scores, UserError, allocate, estimate_sensitivity, inject, trainable_parameters
from spt_dist.allocation.costs import AllocationRule, Chooser, block_of
from spt_dist.allocation.kinds import ModuleOptions, structured_cost
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard
from spt_dist.tuning.adapter import Adapter
from spt_dist.tuning.lora import LowRank
from spt_dist.tuning.prompts import Prompts
from spt_dist.tuning.registry import make_module
from spt_dist.tuning.structured import ModuleSpec
from tests.models_for_tests import make_samples, make_vit
from tests.ranks import run_ranks
from tests.scores_for_tests import make_info

WIDTH, HIDDEN, CLS_TOKEN = 6, 12, 5
IN_BLOCK = {
    "norm1.weight": (WIDTH,),
    "attn.q.weight": (9, WIDTH),
    "attn.q.bias": (9,),
    "mlp.fc1.weight": (HIDDEN, WIDTH),
    "mlp.fc1.bias": (HIDDEN,),
    "mlp.fc2.weight": (WIDTH, HIDDEN),
}
BLOCKS = {f"blocks.{block}.{name}": shape for block in range(3) for name, shape in IN_BLOCK.items()}
# A matrix before the blocks and one behind them, and a norm.
SHAPES = {"embed.weight": (WIDTH, 4), **BLOCKS, "norm.weight": (WIDTH,), "neck.weight": (10, WIDTH)}
SIZE = sum(map(prod, SHAPES.values()))
BACKBONE = SIZE + CLS_TOKEN
KINDS = ("lora", "adapter", "prompt")
ALPHAS, BETAS = st.sampled_from([1.0, 2.5, 10.0]), st.sampled_from([None, 1.0, 5.0])


def is_matrix(name: str) -> bool:
    return len(SHAPES[name]) == 2


def make_scores(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Scores:
    """Scores without ties; some tensors are much more sensitive than others."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([prod(shape) for shape in shapes.values()])
    level = torch.randn(len(sizes), generator=generator).repeat_interleave(sizes)
    raw = torch.randn(int(sizes.sum()), generator=generator) + 1.5 * level
    info = make_info(
        always_tuned={"cls_token": [1, 1, CLS_TOKEN]},
        matrices=[name for name, shape in shapes.items() if len(shape) == 2],
        backbone_size=int(sizes.sum()) + CLS_TOKEN,
    )
    index = FlatIndex(tuple(shapes), tuple(shapes.values()))
    return Scores(ScoreShard(index, 0, 1.0 + raw.argsort().argsort()), info)


def published_cost(kind: str, rank: int, shape: tuple[int, ...]) -> int:
    """As methods.md has them in 15.2 and 15.4, for a matrix or for a block of that width."""
    if kind == "prompt":
        (width,) = shape
        return rank * width
    d_out, d_in = shape
    return {"lora": rank * (d_in + d_out), "adapter": 2 * rank * d_out + rank + d_out}[kind]


# What is tuned -> how, and what it costs; "sparse" also says which weights.
Tuned = dict[str, tuple[str, int]]


def by_definition(
    scores: Scores, tau: int, kind: str | None, unstructured: bool, rank: int, alpha: float, beta: float | None
) -> tuple[Tuned, dict[str, list[int]]]:
    """What ``torch.topk`` over all scores says: name -> (how, cost), and name -> positions of single weights."""
    mask = torch.zeros(SIZE)
    mask[scores.shard.values.topk(tau).indices] = 1
    parts = dict(zip(SHAPES, mask.split([prod(shape) for shape in SHAPES.values()]), strict=True))
    tuned: Tuned = {}
    replaced: set[str] = set()
    if kind == "prompt":
        units = {
            f"blocks.{block}": [f"blocks.{block}.{name}" for name, shape in IN_BLOCK.items() if len(shape) == 2]
            for block in range(3)
        }
    else:
        units = {name: [name] for name in SHAPES if is_matrix(name)}
    for unit, members in units.items() if kind else ():
        assert kind is not None
        cost = published_cost(kind, rank, (WIDTH,) if kind == "prompt" else SHAPES[unit])
        sensitive = sum(int(parts[name].sum()) for name in members)
        if sensitive and sensitive >= cost / alpha:
            tuned[unit] = (kind, cost)
            replaced.update(members)
    positions = {}
    for name, part in parts.items():
        count, size = int(part.sum()), len(part)
        if not count or name in replaced:
            continue
        if not is_matrix(name) and beta is not None and count >= size / beta:
            tuned[name] = ("vector", size)
        elif unstructured:
            tuned[name] = ("sparse", count)
            positions[name] = part.nonzero().flatten().tolist()
    return tuned, positions


def what(plan: Plan) -> tuple[Tuned, dict[str, list[int]]]:
    """A plan in the form of ``by_definition``."""
    tuned: Tuned = {
        name: (kind, published_cost(kind, plan.rank, plan.shapes[name])) for name, kind in plan.matrices.items()
    }
    tuned |= {name: ("vector", prod(SHAPES[name])) for name in plan.vectors}
    positions = {name: indices.tolist() for name, indices in plan.sparse.items()}
    return tuned | {name: ("sparse", len(found)) for name, found in positions.items()}, positions


def total(tuned: Tuned) -> int:
    return CLS_TOKEN + sum(cost for _, cost in tuned.values())


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_costs_are_the_published_formulas_and_what_the_modules_have(
    out_features: int, in_features: int, rank: int, parallel: bool
) -> None:
    spec = ModuleSpec(in_features, out_features, rank, parallel=parallel)
    made = {"lora": LowRank(spec), "adapter": Adapter(spec), "prompt": Prompts(rank, in_features)}
    for kind, module in made.items():
        shape = (in_features,) if kind == "prompt" else (out_features, in_features)
        found = sum(parameter.numel() for parameter in module.parameters())
        assert found == structured_cost(kind, shape, rank) == published_cost(kind, rank, shape)
    assert type(make_module("lora", spec)) is LowRank
    assert type(make_module("adapter", spec)) is Adapter


def test_costs_of_a_vit_b_are_those_of_the_master_table() -> None:
    """Methods.md, section 0: prompts of 100 tokens in all blocks, and section 15.2: thresholds times alpha."""
    assert 12 * structured_cost("prompt", (768,), 100) == 921_600
    for kind, square, fc1, fc2 in (("lora", 12_288, 30_720, 30_720), ("adapter", 13_064, 52_232, 13_064)):
        assert structured_cost(kind, (768, 768), 8) == square
        assert structured_cost(kind, (3072, 768), 8) == fc1
        assert structured_cost(kind, (768, 3072), 8) == fc2


def test_blocks_are_told_by_their_names() -> None:
    assert block_of("blocks.3.attn.q.weight") == "blocks.3"
    assert block_of("layers.1.blocks.10.mlp.fc1.bias") == "layers.1.blocks.10"
    assert block_of("patch_embed.proj.weight") is None
    assert block_of("norm.weight") is None


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, SIZE),
    st.sampled_from([(kind, alone) for kind in KINDS for alone in (True, False)] + [(None, True)]),
    st.integers(1, 4),
    ALPHAS,
    BETAS,
    st.integers(0, 1000),
)
def test_tau_gives_the_plan_of_the_definition(
    tau: int, parts: tuple[str | None, bool], rank: int, alpha: float, beta: float | None, seed: int
) -> None:
    """Structured modules alone, single weights alone, and both."""
    kind, unstructured = parts
    scores = make_scores(seed)
    plan = allocate(scores, tau=tau, structured=kind, unstructured=unstructured, rank=rank, alpha=alpha, beta=beta)
    wanted, positions = by_definition(scores, tau, kind, unstructured, rank, alpha, beta)
    assert what(plan) == (wanted, positions)
    assert plan.num_trainable == total(wanted)
    assert plan.method == (f"spt-{kind}" if kind else "spt")
    for name in plan.matrices:
        assert plan.shapes[name] == ((WIDTH,) if kind == "prompt" else SHAPES[name])


def test_the_definition_reaches_every_case_with_prompts() -> None:
    """Prompts in some blocks only, whose vectors stay, beside single weights of other blocks and outside of them."""
    scores = make_scores(1)
    plan = allocate(scores, tau=90, structured="prompt", rank=3, alpha=1.0, beta=5.0)
    prompted = set(plan.matrices)
    assert 0 < len(prompted) < 3
    assert any(block_of(name) in prompted for name in [*plan.vectors, *plan.sparse] if not is_matrix(name))
    assert not any(block_of(name) in prompted for name in plan.sparse if is_matrix(name))
    assert any(name.startswith("blocks") for name in plan.sparse if is_matrix(name))
    assert plan.sparse.keys() & {"embed.weight", "neck.weight"}


@settings(max_examples=100, deadline=None)
@given(st.integers(CLS_TOKEN + 1, BACKBONE), st.sampled_from(KINDS), st.booleans(), ALPHAS, BETAS, st.integers(0, 1000))
def test_budget_is_never_exceeded_and_one_more_weight_would(
    budget: int, kind: str, unstructured: bool, alpha: float, beta: float | None, seed: int
) -> None:
    scores = make_scores(seed)
    plan = allocate(scores, budget=budget, structured=kind, unstructured=unstructured, rank=2, alpha=alpha, beta=beta)
    assert plan.num_trainable <= budget
    tau = plan.options["tau"]
    assert what(plan) == by_definition(scores, tau, kind, unstructured, 2, alpha, beta)
    if tau < SIZE:
        more, _ = by_definition(scores, tau + 1, kind, unstructured, 2, alpha, beta)
        assert total(more) > budget


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_1_never_costs_more_than_the_sensitive_weights(kind: str) -> None:
    for tau in range(0, SIZE, 11):
        assert allocate(make_scores(tau), tau=tau, structured=kind, rank=1).num_trainable <= tau + CLS_TOKEN


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_more_sensitive_weights_never_cost_less(data: st.DataObject) -> None:
    """The total of ``Chooser`` for counts that grow one by one, on which the search for the budget relies."""
    sides = st.integers(1, 7)
    shapes, matrices = {}, []
    for number in range(data.draw(st.integers(1, 8))):
        block = data.draw(st.sampled_from(["", "blocks.0.", "blocks.1.", "stages.0.blocks.1."]))
        shape = tuple(data.draw(st.lists(sides, min_size=1, max_size=3)))
        shapes[f"{block}x{number}.weight"] = shape
        if len(shape) == 2 and data.draw(st.booleans()):
            matrices.append(f"{block}x{number}.weight")
    kind = data.draw(st.sampled_from([None, *KINDS]))
    rule = AllocationRule(
        structured=kind,
        unstructured=kind is None or data.draw(st.booleans()),
        rank=data.draw(st.integers(1, 4)),
        alpha=data.draw(st.floats(1, 20)),
        beta=data.draw(st.none() | st.floats(1, 20)),
    )
    chooser = Chooser(rule, list(shapes), list(shapes.values()), matrices)
    order = data.draw(
        st.permutations([place for place, shape in enumerate(shapes.values()) for _ in range(prod(shape))])
    )
    counts = [0] * len(shapes)
    previous = chooser.choose(counts).cost
    assert previous == 0
    for place in order:
        counts[place] += 1
        choice = chooser.choose(counts)
        assert choice.cost >= previous
        previous = choice.cost
        singles = sum(counts[list(shapes).index(name)] for name in choice.sparse)
        whole = sum(prod(shapes[name]) for name in choice.vectors)
        assert choice.cost == singles + whole + sum(unit.cost for unit in choice.units)


@pytest.mark.parametrize("kind", KINDS)
def test_presets_fill_in_alpha_beta_and_the_modules(kind: str) -> None:
    scores = make_scores(1, BLOCKS)
    own = {"alpha": 3.0, "beta": 2.0, "init": "normal", "dropout": 0.5, "drop_path": 0.25}
    plan = allocate(scores, tau=60, structured=kind, rank=2, **own)
    assert plan.modules == ModuleOptions("normal", 0.5, 0.25, ())
    assert (plan.options["alpha"], plan.options["beta"]) == (3.0, 2.0)
    paper = allocate(scores, tau=60, structured=kind, rank=2, preset="paper", **own)
    assert paper.modules == ModuleOptions("zero", 0.0, 0.0, ())
    assert (paper.options["alpha"], paper.options["beta"]) == (1.0, None)
    released = allocate(scores, tau=60, structured=kind, rank=2, preset="released", **own)
    assert released.modules == ModuleOptions("normal", 0.1, 0.1, ("proj",))
    assert (released.options["alpha"], released.options["beta"]) == (10.0, 5.0)
    assert set(released.matrices.values()) == {kind}


FIELDS_OF_VERSION_1: dict[str, Any] = {
    "version": 1,
    "matrices": {"blocks.0.attn.q.weight": "lora"},
    "vectors": ["blocks.0.norm1.bias"],
    "sparse": ["blocks.1.mlp.fc1.weight"],
    "parameters": ["cls_token"],
    "head": ["head.weight", "head.bias"],
    "shapes": {
        "cls_token": [1, 1, 24],
        "blocks.0.attn.q.weight": [24, 24],
        "blocks.0.norm1.bias": [24],
        "blocks.1.mlp.fc1.weight": [96, 24],
    },
    "rank": 2,
    "method": "spt-lora",
    "backbone_size": 20_000,
    "options": {"tau": 123, "alpha": 1.0},
}


def write_plan(path: Path, fields: dict[str, Any]) -> Path:
    """A plan file as such, with one sparse selection."""
    metadata = {"format": "pt", "spt_dist": json.dumps({"kind": "plan", "plan": fields})}
    save_file({"sparse/blocks.1.mlp.fc1.weight": torch.tensor([0, 5, 2303])}, path, metadata=metadata)
    return path


def test_plans_of_version_1_are_read(tmp_path: Path) -> None:
    plan = Plan.load(write_plan(tmp_path / "plan.safetensors", FIELDS_OF_VERSION_1))
    assert plan.matrices == {"blocks.0.attn.q.weight": "lora"}
    assert plan.modules == ModuleOptions(init="zero", dropout=0.0, drop_path=0.0, parallel=())
    assert plan.sparse["blocks.1.mlp.fc1.weight"].tolist() == [0, 5, 2303]
    assert plan.num_trainable == 24 + 2 * 48 + 24 + 3
    tuned = inject(make_vit(), plan)
    trained = sum(p.numel() for name, p in trainable_parameters(tuned) if not name.startswith("head."))
    assert trained == plan.num_trainable
    plan.save(tmp_path / "again.safetensors")
    again = Plan.load(tmp_path / "again.safetensors")
    assert torch.equal(again.sparse.pop("blocks.1.mlp.fc1.weight"), plan.sparse.pop("blocks.1.mlp.fc1.weight"))
    assert again == plan


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_plans_of_unknown_versions_are_refused(version: object, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.safetensors", FIELDS_OF_VERSION_1 | {"version": version})
    with pytest.raises(UserError, match=f"plan.safetensors: holds a plan of version {version}, this spt_dist reads up"):
        Plan.load(path)


def test_damaged_module_options_are_refused(tmp_path: Path) -> None:
    for modules in ({"init": "random"}, {"warmth": 1}, {"dropout": 2.0}):
        path = write_plan(tmp_path / "plan.safetensors", FIELDS_OF_VERSION_1 | {"version": 2, "modules": modules})
        with pytest.raises(UserError, match="the plan in this file is damaged"):
            Plan.load(path)


def test_module_options_survive_a_file(tmp_path: Path) -> None:
    options = ModuleOptions("normal", 0.25, 0.5, ("proj", "fc2"))
    plan = Plan(matrices={"blocks.0": "prompt"}, shapes={"blocks.0": (24,)}, modules=options)
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan


def test_empty_selections_are_left_out() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    names = {"blocks.0.mlp.fc1.weight": (96, 24), "blocks.0.norm1.bias": (24,)}
    vit = make_vit()
    plan = Plan(sparse=dict.fromkeys(names, empty), shapes=names, backbone_size=1)
    assert plan.sparse == {}
    assert plan.num_trainable == 0
    assert [*trainable_parameters(inject(vit, plan))] == []
    assert list(vit.state_dict()) == list(make_vit().state_dict())
    some = Plan(
        sparse=dict.fromkeys(names, empty) | {"norm.bias": torch.tensor([1])}, shapes=names | {"norm.bias": (24,)}
    )
    assert list(some.sparse) == ["norm.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_summary_adds_up(kind: str) -> None:
    plan = allocate(make_scores(3), tau=120, structured=kind, rank=2, alpha=2.5, beta=5.0)
    title, *lines = plan.summary().splitlines()
    assert f"{plan.num_trainable:,} trainable parameters ({plan.num_trainable / BACKBONE:.3%} of the backbone)" in title
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if line.startswith("│")]
    rows = {name: [int(cell.replace(",", "")) for cell in rest] for name, *rest in cells}
    totals = rows.pop("total")
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == totals
    assert totals[1:] == [plan.num_structured, plan.num_vectors, plan.num_sparse, CLS_TOKEN]
    assert sum(totals[1:]) == plan.num_trainable
    assert all(totals), "the plan has some of everything"
    assert rows["cls_token"] == [0, 0, 0, 0, CLS_TOKEN]
    if kind == "prompt":
        assert rows["blocks"] == [len(plan.matrices), len(plan.matrices) * 2 * WIDTH, 0, 0, 0]
    else:
        count = len([name for name in plan.matrices if name.endswith("fc1.weight")])
        assert rows["blocks.mlp.fc1.weight"][:2] == [count, count * published_cost(kind, 2, (HIDDEN, WIDTH))]


def plans_on_ranks() -> dict[str, object]:
    """Score a share of the samples and allocate adapters and prompts."""
    import torch.distributed as dist

    images, labels = make_samples(8)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    scores = estimate_sensitivity(make_vit(), [(images[mine], labels[mine])], F.cross_entropy)
    found: dict[str, object] = {}
    for kind, budget in (("adapter", 700), ("prompt", 400)):
        plan = allocate(scores, budget=budget, structured=kind, rank=2, alpha=10, beta=5)
        assert plan.num_trainable <= budget
        sparse = {name: indices.tolist() for name, indices in plan.sparse.items()}
        found[kind] = {"matrices": plan.matrices, "vectors": plan.vectors, "sparse": sparse, "options": plan.options}
    return found


@pytest.mark.distributed
def test_every_world_size_makes_the_same_plans() -> None:
    one = run_ranks(plans_on_ranks, 1)[0]
    for kind in ("adapter", "prompt"):
        assert set(one[kind]["matrices"].values()) == {kind}
        assert one[kind]["vectors"]
        assert one[kind]["sparse"]
    assert set(one["prompt"]["matrices"]) <= {"blocks.0", "blocks.1"}
    for world_size in (2, 4):
        for plans in run_ranks(plans_on_ranks, world_size):
            assert plans == one
