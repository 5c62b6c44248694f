"""Plans for several budgets from one pass: the same as one by one, on any number of ranks; mistakes cost no pass."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spt_dist import Plan, Scores, UserError, allocate
from spt_dist.config import load_config
from spt_dist.data.tasks import build_task
from spt_dist.training.scoring import build_model, score
from spt_dist.training.sweep import allocate_budgets, check_sweep, parse_budgets, save_plans
from tests.launch.runs import write_config
from tests.ranks import run_ranks

# What the config says about the method beside its budget.
OPTIONS: dict[str, Any] = {"structured": "lora", "rank": 2, "alpha": 4.0, "beta": 4.0}
BUDGETS = {"budget_0.02": 0.02, "budget_1000": 1000, "budget_0.2": 0.2}


def same(one: Plan, other: Plan) -> bool:
    """Whether two plans are equal in everything, sparse indices and options included."""
    (tensors, metadata), (more_tensors, more_metadata) = one.to_tensors(), other.to_tensors()
    equal = tensors.keys() == more_tensors.keys() and metadata == more_metadata
    return equal and all(torch.equal(tensors[name], more_tensors[name]) for name in tensors)


def sweep_on_ranks(path: str, folder: str) -> list[str]:
    """Score, sweep and save on every rank; the names of the plans that differ from those of single calls."""
    config = load_config(path)
    model, task = build_model(config), build_task(config.data, config.model.num_classes)
    check_sweep(config, model, BUDGETS)
    scores = score(config, model, task)
    plans = allocate_budgets(scores, config, BUDGETS)
    save_plans(plans, Path(folder, "plans"))
    scores.save(Path(folder, "scores"))
    assert list(plans) == list(BUDGETS)
    return [
        name
        for name, budget in BUDGETS.items()
        if not same(plans[name], allocate(scores, budget=budget, **OPTIONS)) or plans[name].num_trainable == 0
    ]


@pytest.mark.distributed
def test_sweep_makes_the_plans_of_single_calls_on_any_number_of_ranks(tmp_path: Path) -> None:
    path = str(write_config(tmp_path / "tiny.py"))
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        assert run_ranks(sweep_on_ranks, world_size, path, str(folder)) == [[]] * world_size
        assert {file.name for file in (folder / "plans").iterdir()} == {f"{name}.safetensors" for name in BUDGETS}
    # Scores of one and of two ranks differ by rounding, so the plans of both are made from the same ones.
    scores = Scores.load(tmp_path / "2" / "scores")
    plans = {name: Plan.load(tmp_path / "2" / "plans" / f"{name}.safetensors") for name in BUDGETS}
    for name, budget in BUDGETS.items():
        assert same(plans[name], allocate(scores, budget=budget, **OPTIONS))
    sizes = [plan.num_trainable for plan in plans.values()]
    size = scores.info.backbone_size
    assert sizes[0] <= 0.02 * size < sizes[1] <= 1000 < sizes[2] <= 0.2 * size
    assert all(plan.matrices and plan.sparse for plan in plans.values())


def test_a_tau_in_the_config_makes_way(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "tiny.py"), {"method.tau": 5})
    check_sweep(config, build_model(config), {"budget_100": 100})


def test_typed_budgets() -> None:
    budgets = parse_budgets(["400000", "4e5", "0.002", "2e-3", "1", "1.0", "2.5"])
    assert [(name, budget, type(budget)) for name, budget in budgets.items()] == [
        ("budget_400000", 400_000, int),
        ("budget_0.002", 0.002, float),
        ("budget_1", 1, int),
        ("budget_1.0", 1.0, float),
        ("budget_2.5", 2.5, float),
    ]
    with pytest.raises(UserError, match=r"budget=0\.4M: a budget is a number of parameters \(400000\)"):
        parse_budgets(["1000", "0.4M"])


@pytest.mark.parametrize(
    ("options", "budgets", "message"),
    [
        ({}, {"a": 1000, "b": 10**9}, r"budget=1000000000: above the backbone's"),
        ({}, {"a": 2.5}, r"budget=2\.5: a fraction lies between 0 and 1"),
        ({}, {"a": 1e-9}, r"budget=1e-09: 0 parameters are not enough for cls_token's 32"),
        ({}, {"a": float("nan")}, r"budget=nan: give a number"),
        ({"method.alpha": 0.5}, {"a": 100}, r"alpha=0\.5: has to be a number of at least 1"),
        (
            {"method": {"type": "lora", "_delete_": True}},
            {"a": 100},
            r"method\.type='lora' has no budget to sweep over",
        ),
        (
            {"method.preset": "released", "model.kwargs.init_values": 0.1},
            {"a": 100},
            r"has no rule for blocks\.0\.ls1\.gamma",
        ),
        (
            {
                "method.structured": "prompt",
                "model.name": "convnext_atto",
                "model.kwargs": {"_delete_": True, "conv_mlp": False},
            },
            {"a": 100},
            r"prompts for .*, which is a ConvNeXt",
        ),
    ],
)
def test_mistakes_are_found_before_the_pass(
    tmp_path: Path, options: dict[str, Any], budgets: dict[str, int | float], message: str
) -> None:
    config = load_config(write_config(tmp_path / "tiny.py"), options)
    with pytest.raises(UserError, match=message):
        check_sweep(config, build_model(config), budgets)
