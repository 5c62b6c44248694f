"""No plan made from scores exceeds what is said before there are any."""

from typing import Any

import pytest
import torch
from torch import nn

import spt_dist
from spt_dist.allocation.bound import densest_plan, most_trained
from spt_dist.allocation.request import AllocationRequest
from spt_dist.models.matrices import take_inventory
from spt_dist.tuning.inject import inject
from tests.evaluation.test_rehearsal import kept_by
from tests.models_for_tests import make_samples, make_vit

BACKBONE = {"depth": 3, "embed_dim": 48, "num_heads": 4}


def make_scores(model: nn.Module) -> spt_dist.Scores:
    return spt_dist.estimate_sensitivity(model, [make_samples(4)], nn.functional.cross_entropy)


@pytest.mark.parametrize("init_values", [None, 0.1])
@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.02},
        {"budget": 0.3},
        {"tau": 3000},
        {"tau": 3000, "alpha": 10.0, "beta": 5.0},
        {"tau": 3000, "beta": 2.0, "unstructured": False},
        {"budget": 0.1, "structured": None},
        {"tau": 5000, "structured": "adapter", "alpha": 4.0},
        {"tau": 5000, "structured": "prompt", "alpha": 4.0},
    ],
)
def test_plans_stay_below(options: dict[str, Any], init_values: float | None) -> None:
    request = AllocationRequest(rank=2, **options)
    model = make_vit(init_values=init_values, **BACKBONE)
    plan = spt_dist.allocate(make_scores(model), **vars(request))
    inventory = take_inventory(model)
    densest = densest_plan(request, inventory)
    assert 0 < plan.num_trainable <= most_trained(request, inventory)
    images, _ = make_samples(8)
    found = kept_by(inject(make_vit(init_values=init_values, **BACKBONE), plan).train(), images)
    most = kept_by(inject(model, densest).train(), images)
    assert found <= most


def test_the_densest_plan_tunes_all_that_it_may() -> None:
    inventory = take_inventory(make_vit(**BACKBONE))
    plan = densest_plan(AllocationRequest(budget=0.1), inventory)
    tuned = {*plan.matrices, *plan.sparse, *plan.vectors, *plan.parameters}
    assert tuned == {item.name for item in inventory.parameters}
    assert sorted(plan.sparse) == [f"blocks.{block}.attn.k.weight" for block in range(3)]
    assert all(torch.equal(positions, torch.arange(48)) for positions in plan.sparse.values())
    # Single weights are off, and so are all tensors but matrices.
    plan = densest_plan(AllocationRequest(budget=0.1, unstructured=False), inventory)
    assert set(plan.matrices) == {item.name for item in inventory.parameters if item.is_matrix}
    assert not plan.sparse and not plan.vectors
    # Vectors, and neither convolutions nor position embeddings, are tuned whole.
    plan = densest_plan(AllocationRequest(budget=0.1, unstructured=False, beta=5.0), inventory)
    assert set(plan.vectors) == {item.name for item in inventory.parameters if len(item.shape) == 1}
    plan = densest_plan(AllocationRequest(budget=0.1, structured="prompt"), inventory)
    assert plan.matrices == {f"blocks.{block}": "prompt" for block in range(3)}
    assert len(plan.sparse) == 3 * 6


def test_counts_before_scores() -> None:
    inventory = take_inventory(make_vit(**BACKBONE))
    assert most_trained(AllocationRequest(budget=1000), inventory) == 1000
    assert most_trained(AllocationRequest(budget=0.1), inventory) == int(0.1 * inventory.backbone_size)
    assert most_trained(AllocationRequest(tau=100), inventory) == 100 + 48
    assert most_trained(AllocationRequest(tau=100, alpha=3.0, beta=7.0), inventory) == 700 + 48
    assert most_trained(AllocationRequest(tau=10**9), inventory) == inventory.backbone_size
    # The published sweep may come out above the budget.
    assert most_trained(AllocationRequest(budget=1000, preset="released"), inventory) == 2000


def test_the_published_choice_goes_by_names() -> None:
    plan = densest_plan(AllocationRequest(budget=1000, preset="released"), take_inventory(make_vit(**BACKBONE)))
    assert not any("embed" in name for name in (*plan.matrices, *plan.vectors, *plan.sparse))
    with pytest.raises(spt_dist.UserError, match="plain Vision Transformers"):
        model = make_vit(init_values=0.1, **BACKBONE)
        densest_plan(AllocationRequest(budget=1000, preset="released"), take_inventory(model))
