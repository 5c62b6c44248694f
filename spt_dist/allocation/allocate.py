"""Scores and a budget become a plan (SPT, section 3.3)."""

from math import prod

from torch import Tensor

from spt_dist.allocation.costs import Chooser
from spt_dist.allocation.plan import Plan
from spt_dist.allocation.released import eligible_names, matrix_names, sweep
from spt_dist.allocation.request import AllocationRequest
from spt_dist.sensitivity.scores import ScoreInfo, Scores
from spt_dist.sensitivity.selection import Threshold, count_selected, selected_positions, solve_threshold, top_tau
from spt_dist.sensitivity.shards import ScoreShard, restrict


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
    init: str = "zero",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    preset: str | None = None,
) -> Plan:
    """Choose what to tune. With several ranks a collective call that returns the same plan on each.

    Args:
        scores: the result of ``estimate_sensitivity``.
        budget: the most trainable parameters, head not counted: a count, or a fraction of the backbone (a float
            up to 1). The largest set of most sensitive weights whose tuning stays within it is taken. (The preset
            "released" comes as near as its sweep does, and may exceed it.)
        tau: instead of a budget, the number of most sensitive weights.
        structured: kind of the structured modules: "lora", "adapter" (both put on a matrix), "prompt" (tokens put into
            a block, in the place of the sensitive weights of all its matrices), or one that was registered; ``None``
            for single weights only.
        unstructured: whether weights may be tuned one by one.
        rank: size of the structured modules: rank of LoRA, width of an adapter, number of prompts.
        alpha: a module takes the place of ``c`` sensitive weights if ``c >= cost / alpha``.
        beta: a vector is tuned whole once a ``1 / beta`` part of it is sensitive; ``None`` for never.
        init, dropout, drop_path: of the structured modules, see ``kinds.ModuleOptions``.
        preset: "paper" (``alpha=1, beta=None``, updates that start at zero, no dropout) or "released" (``alpha=10,
            beta=5``, the published code's modules, see ``kinds.PRESETS``, and its choice of names and of ``tau``, see
            ``allocation.released``); overrides all these.

    Raises:
        UserError: neither or both of ``budget`` and ``tau``; a budget below one weight or above the backbone;
            another option out of range; "released" on another model than a plain ViT, or with a budget that its sweep
            does not come near.
    """
    request = AllocationRequest(
        budget=budget,
        tau=tau,
        structured=structured,
        unstructured=unstructured,
        rank=rank,
        alpha=alpha,
        beta=beta,
        init=init,
        dropout=dropout,
        drop_path=drop_path,
        preset=preset,
    )
    info = scores.info
    reserved = sum(prod(shape) for shape in info.always_tuned.values())
    rule, limit = request.resolve(info.backbone_size, reserved)
    names = scores.selectable
    matrices = set(info.matrices)
    if preset == "released":
        names = eligible_names(names)
        matrices = matrix_names(names, matrices)
    shard = restrict(scores.shard, names)

    chooser = Chooser(rule, shard.index.names, shard.index.shapes, matrices)

    def total(counts: Tensor) -> int:
        return reserved + chooser.choose(counts.tolist()).cost

    if limit is None:
        assert tau is not None
        threshold = top_tau(shard, tau)
    elif preset == "released":
        threshold = sweep(shard, total, limit)
    else:
        threshold = solve_threshold(shard, total, limit)
    return _make_plan(info, shard, chooser, threshold, request)


def _make_plan(
    info: ScoreInfo, shard: ScoreShard, chooser: Chooser, threshold: Threshold, request: AllocationRequest
) -> Plan:
    """The plan for a set of sensitive weights. Collective."""
    rule = chooser.rule
    shapes = dict(zip(shard.index.names, shard.index.shapes, strict=True))
    counts = count_selected(shard, threshold).tolist()
    choice = chooser.choose(counts)
    always = {name: tuple(shape) for name, shape in info.always_tuned.items()}
    structured = {unit.name: unit.shape for unit in choice.units}
    return Plan(
        matrices=dict.fromkeys(structured, str(rule.structured)),
        vectors=choice.vectors,
        sparse=selected_positions(shard, threshold, choice.sparse),
        parameters=list(always),
        head=list(info.head),
        shapes=always | structured | {name: shapes[name] for name in (*choice.vectors, *choice.sparse)},
        rank=rule.rank,
        modules=request.module_options(),
        method=f"spt-{rule.structured}" if rule.structured else "spt",
        backbone_size=info.backbone_size,
        options={
            "preset": request.preset,
            "budget": request.budget,
            "tau": sum(counts),
            "structured": rule.structured,
            "unstructured": rule.unstructured,
            "alpha": rule.alpha,
            "beta": rule.beta,
            "criterion": info.criterion,
            "num_samples": info.num_samples,
        },
    )
