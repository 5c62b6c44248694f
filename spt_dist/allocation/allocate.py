"""Scores and a budget become a plan (SPT, section 3.3)."""

from math import prod

from torch import Tensor

from spt_dist.allocation.costs import PRESETS, AllocationRule
from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.sensitivity.scores import Scores
from spt_dist.sensitivity.selection import count_selected, selected_positions, solve_threshold, top_tau


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
            below 1). The largest set of most sensitive weights whose tuning stays within it is taken.
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
    always = {name: tuple(shape) for name, shape in scores.info.always_tuned.items()}
    reserved = sum(prod(shape) for shape in always.values())
    rule, limit = check_request(
        scores.info.backbone_size,
        reserved,
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

    def total(counts: Tensor) -> int:
        return sum(rule.choose(shape, count).cost for shape, count in zip(shapes, counts.tolist(), strict=True))

    if limit is None:
        assert tau is not None
        threshold = top_tau(scores.shard, tau)
    else:
        threshold = solve_threshold(scores.shard, total, limit - reserved)
    counts = count_selected(scores.shard, threshold).tolist()
    chosen = {
        name: rule.choose(shape, count).how for name, shape, count in zip(scores.names, shapes, counts, strict=True)
    }
    sparse_names = [name for name, how in chosen.items() if how == "sparse"]
    tuned = {name: shape for name, shape in zip(scores.names, shapes, strict=True) if chosen[name] != "frozen"}
    return Plan(
        matrices={name: str(structured) for name, how in chosen.items() if how == "structured"},
        vectors=[name for name, how in chosen.items() if how == "vector"],
        sparse=selected_positions(scores.shard, threshold, sparse_names),
        parameters=list(always),
        head=list(scores.info.head),
        shapes={**always, **tuned},
        rank=rank,
        method="spt",
        backbone_size=scores.info.backbone_size,
        options={
            "budget": budget,
            "tau": int(sum(counts)),
            "structured": structured,
            "unstructured": unstructured,
            "alpha": rule.alpha,
            "beta": rule.beta,
            "criterion": scores.info.criterion,
            "num_samples": scores.num_samples,
        },
    )


def check_request(
    backbone_size: int,
    reserved: int,
    *,
    budget: int | float | None = None,
    tau: int | None = None,
    structured: str | None = "lora",
    unstructured: bool = True,
    rank: int = 8,
    alpha: float = 1.0,
    beta: float | None = None,
    preset: str | None = None,
) -> tuple[AllocationRule, int | None]:
    """Check the arguments of ``allocate`` without any scores, so that a mistake is found before the pass.

    Args:
        backbone_size: weights of the backbone, head not counted.
        reserved: parameters that are trained whatever the scores (``cls_token``).
        budget, tau, structured, unstructured, rank, alpha, beta, preset: as in ``allocate``.

    Returns:
        The rule, and the budget as a number of parameters (``None`` if ``tau`` is given).

    Raises:
        UserError: as ``allocate``.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"preset={preset!r}: choose one of {', '.join(PRESETS)}")
        alpha, beta = PRESETS[preset]
    if (budget is None) == (tau is None):
        raise UserError("give either budget (trainable parameters) or tau (sensitive weights)")
    rule = AllocationRule(structured, unstructured, rank, alpha, beta)
    return rule, None if budget is None else resolve_budget(budget, backbone_size, reserved)


def resolve_budget(budget: int | float, backbone_size: int, reserved: int) -> int:
    """A budget as a number of parameters.

    Args:
        budget: a count, or a fraction of the backbone if it is a float below 1.
        backbone_size: weights of the backbone, head not counted.
        reserved: parameters that are trained whatever the scores (``cls_token``).

    Raises:
        UserError: not a number; below ``reserved`` and one weight; above the backbone.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or budget != budget:
        raise UserError(f"budget={budget!r}: give a number of parameters or a fraction of the backbone")
    limit = int(budget * backbone_size) if isinstance(budget, float) and budget < 1 else int(budget)
    if limit > backbone_size:
        raise UserError(
            f"budget={budget}: above the backbone's {backbone_size:,} weights; use full fine-tuning for that"
        )
    if limit < reserved + 1:
        what = (
            f"cls_token's {reserved} parameters, which are always tuned, and one weight" if reserved else "one weight"
        )
        raise UserError(f"budget={budget}: {limit} parameters are not enough for {what}; give at least {reserved + 1}")
    return limit
