"""Scores and a budget become a plan (SPT, section 3.3)."""

from math import prod

from torch import Tensor

from spt_dist.allocation.costs import AllocationRule
from spt_dist.allocation.plan import Plan
from spt_dist.allocation.request import AllocationRequest
from spt_dist.sensitivity.scores import Scores
from spt_dist.sensitivity.selection import Threshold, count_selected, selected_positions, solve_threshold, top_tau


def allocate(
    scores: Scores,
    *,
    budget: int | float | None = None,
    tau: int | None = None,
    structured: str | None = "lora",
    unstructured: bool = True,
    rank: int = 8,
    alpha: float = 1.0,
    beta: float | None = None,
    preset: str | None = None,
) -> Plan:
    """Choose what to tune. With several ranks a collective call that returns the same plan on each.

    Args:
        scores: the result of ``estimate_sensitivity``.
        budget: the most trainable parameters, head not counted: a count, or a fraction of the backbone (a float
            up to 1). The largest set of most sensitive weights whose tuning stays within it is taken.
        tau: instead of a budget, the number of most sensitive weights.
        structured: kind of the structured module ("lora"), or ``None`` for single weights only.
        unstructured: whether weights may be tuned one by one.
        rank: rank of the structured modules.
        alpha: a matrix with ``c`` sensitive weights becomes structured if ``c >= cost / alpha``.
        beta: a vector is tuned whole once a ``1 / beta`` part of it is sensitive; ``None`` for never.
        preset: "paper" (``alpha=1, beta=None``) or "released" (``alpha=10, beta=5``); overrides both.

    Raises:
        UserError: neither or both of ``budget`` and ``tau``; a budget below one weight or above the backbone;
            another option out of range.
    """
    request = AllocationRequest(
        budget=budget,
        tau=tau,
        structured=structured,
        unstructured=unstructured,
        rank=rank,
        alpha=alpha,
        beta=beta,
        preset=preset,
    )
    shapes = scores.shard.index.shapes
    reserved = sum(prod(shape) for shape in scores.info.always_tuned.values())
    rule, limit = request.resolve(scores.info.backbone_size, reserved)

    def total(counts: Tensor) -> int:
        return sum(rule.choose(shape, count).cost for shape, count in zip(shapes, counts.tolist(), strict=True))

    if limit is None:
        assert tau is not None
        threshold = top_tau(scores.shard, tau)
    else:
        threshold = solve_threshold(scores.shard, total, limit - reserved)
    return _make_plan(scores, rule, threshold, budget)


def _make_plan(scores: Scores, rule: AllocationRule, threshold: Threshold, budget: int | float | None) -> Plan:
    """The plan for a set of sensitive weights. Collective."""
    shapes = dict(zip(scores.names, scores.shard.index.shapes, strict=True))
    counts = dict(zip(scores.names, count_selected(scores.shard, threshold).tolist(), strict=True))
    how = {name: rule.choose(shapes[name], counts[name]).how for name in scores.names}
    always = {name: tuple(shape) for name, shape in scores.info.always_tuned.items()}
    sparse_names = [name for name in scores.names if how[name] == "sparse"]
    return Plan(
        matrices={name: str(rule.structured) for name in scores.names if how[name] == "structured"},
        vectors=[name for name in scores.names if how[name] == "vector"],
        sparse=selected_positions(scores.shard, threshold, sparse_names),
        parameters=list(always),
        head=list(scores.info.head),
        shapes=always | {name: shapes[name] for name in scores.names if how[name] != "frozen"},
        rank=rule.rank,
        method=f"spt-{rule.structured}" if rule.structured else "spt",
        backbone_size=scores.info.backbone_size,
        options={
            "budget": budget,
            "tau": sum(counts.values()),
            "structured": rule.structured,
            "unstructured": rule.unstructured,
            "alpha": rule.alpha,
            "beta": rule.beta,
            "criterion": scores.info.criterion,
            "num_samples": scores.num_samples,
        },
    )
