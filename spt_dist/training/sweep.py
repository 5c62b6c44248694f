"""A sweep: plans for several budgets from the scores of one pass."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from spt_dist.allocation.allocate import allocate
from spt_dist.allocation.plan import Plan
from spt_dist.allocation.request import AllocationRequest
from spt_dist.errors import UserError
from spt_dist.sections import RunConfig
from spt_dist.sensitivity.scores import Scores
from spt_dist.sensitivity.shards import get_rank
from spt_dist.training.scoring import check_request, method_options


def parse_budgets(texts: Sequence[str]) -> dict[str, int | float]:
    """Budgets as they are typed: "400000" and "4e5" are counts, "0.004" is a fraction of the backbone.

    Returns:
        Name of the budget's plan ("budget_400000", "budget_0.004") -> budget; each budget once.

    Raises:
        UserError: one is not a number.
    """
    budgets: dict[str, int | float] = {}
    for text in texts:
        try:
            number = float(text)
        except ValueError:
            raise UserError(
                f"budget={text}: a budget is a number of parameters (400000) or a fraction of the backbone (0.004)"
            ) from None
        is_count = text.isdecimal() or (number > 1 and number.is_integer())
        budget = int(number) if is_count else number
        budgets[f"budget_{budget}"] = budget
    return budgets


def check_sweep(config: RunConfig, model: nn.Module, budgets: Mapping[str, int | float]) -> None:
    """Refuse what ``allocate_budgets`` would refuse, before the scoring pass.

    Args:
        config: its ``method`` section says how to allocate; a budget or tau in it is not used.
        model: the one to be scored.
        budgets: name -> budget.

    Raises:
        UserError: the config's method allocates no budget; as ``AllocationRequest.resolve`` for one of the budgets;
            the preset "released" does not know the model's names; or the model's blocks take no prompts.
    """
    if config.method["type"] != "spt":
        raise UserError(
            f"config: method.type={config.method['type']!r} has no budget to sweep over; take a config with "
            "method.type='spt'"
        )
    for budget in budgets.values():
        check_request(model, _request(config, budget))


def allocate_budgets(scores: Scores, config: RunConfig, budgets: Mapping[str, int | float]) -> dict[str, Plan]:
    """A plan for each budget. Collective; the same on every rank.

    Args:
        scores: of the config's model.
        config: its ``method`` section says how to allocate; a budget or tau in it is not used.
        budgets: name -> budget.

    Returns:
        Name -> plan.

    Raises:
        UserError: as ``allocate``.
    """
    return {name: allocate(scores, **vars(_request(config, budget))) for name, budget in budgets.items()}


def save_plans(plans: Mapping[str, Plan], folder: str | Path) -> dict[str, Path]:
    """Write ``NAME.safetensors`` for each plan; rank 0 does. Returns description -> path."""
    files = {f"plan ({name})": Path(folder, f"{name}.safetensors") for name in plans}
    if get_rank() == 0:
        for plan, path in zip(plans.values(), files.values(), strict=True):
            plan.save(path)
    return files


def _request(config: RunConfig, budget: int | float) -> AllocationRequest:
    return AllocationRequest(**method_options(config) | {"budget": budget, "tau": None})
