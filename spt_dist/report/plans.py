"""Reporting on plans: tables and pictures of each, and a comparison of several."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.files import load_tensors
from spt_dist.report.parts import IN_PLACE, SINGLE, VECTORS, cost_by_way, kinds_of
from spt_dist.report.plan_figures import draw_plan, draw_plans
from spt_dist.tables import format_table

RELEASED_ENDING = ".pth"
PLAN_ENDINGS = (".safetensors", RELEASED_ENDING)


def read_plans(paths: Sequence[Path]) -> dict[str, Plan]:
    """Read plans and name them after their files.

    Args:
        paths: plan files, task files, or allocations that SPT's authors published (``.pth``).

    Returns:
        Name -> plan, in the order of ``paths``. The name is the file's without its ending, with as many of the
        folders above it as it takes to tell all of them apart.

    Raises:
        UserError: a file is missing, damaged or holds no plan; or two differ in nothing but their endings.
    """
    return dict(zip(_name_files(paths), map(_read_plan, paths), strict=True))


def report_plans(plans: Mapping[str, Plan], folder: str | Path) -> tuple[str, dict[str, Path]]:
    """Draw plans: ``plan.png`` of one; ``plan_NAME.png`` of each of several, and ``plans.png`` to compare them.

    Plans that train nothing but the head leave nothing to compare; then there is no ``plans.png``.

    Args:
        plans: name -> plan, at least one.
        folder: where the pictures go.

    Returns:
        Tables of each plan and of their comparison, and what lies where: description -> path.

    Raises:
        UserError: a kind of module is not registered.
    """
    if len(plans) == 1:
        (plan,) = plans.values()
        return plan.summary(), {"picture of the plan": draw_plan(plan, Path(folder, "plan.png"))}
    tables = [f"{name}: {plan.summary()}" for name, plan in plans.items()]
    files = {
        f"picture of the plan ({name})": draw_plan(plan, Path(folder, f"plan_{name}.png"))
        for name, plan in plans.items()
    }
    if any(plan.num_trainable for plan in plans.values()):
        files["picture of all plans"] = draw_plans(plans, Path(folder, "plans.png"))
    return "\n\n".join([*tables, tabulate_plans(plans)]), files


def tabulate_plans(plans: Mapping[str, Plan]) -> str:
    """Compare plans: how many trainable parameters each has, and how they are trained.

    Args:
        plans: name -> plan.

    Returns:
        A table with one row a plan. Columns of modules, one a kind, say how many there are and of what size; all
        others count parameters.

    Raises:
        UserError: a kind of module is not registered.
    """
    kinds, others = kinds_of(plans.values()), (VECTORS, SINGLE, IN_PLACE)
    rows = []
    for name, plan in plans.items():
        numbers, costs = Counter(plan.matrices.values()), cost_by_way(plan)
        rows.append(
            [
                name,
                plan.method,
                f"{plan.num_trainable:,}",
                f"{plan.num_trainable / plan.backbone_size:.3%}" if plan.backbone_size else "",
                *(f"{numbers[kind]} (r{plan.rank})" if numbers[kind] else "0" for kind in kinds),
                *(f"{costs[way]:,}" for way in others),
            ]
        )
    title = "trainable parameters, head not counted; of modules their number and size"
    modules = [f"{kind} modules" for kind in kinds]
    return format_table(title, ["plan", "method", "trainable", "of backbone", *modules, *others], rows)


def _read_plan(path: Path) -> Plan:
    if path.suffix == RELEASED_ENDING:
        return Plan.from_spt_release(path)
    if _is_task_file(path):
        tensors, metadata = load_tensors(path, "delta")
        return Plan.from_tensors(tensors, metadata["plan"], path)
    return Plan.load(path)


def _is_task_file(path: Path) -> bool:
    """Whether the file says that it is one; a file that says nothing, or is none, is not."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("spt_dist", "{}")).get("kind") == "delta"
    except (OSError, SafetensorError, json.JSONDecodeError):
        return False


def _name_files(paths: Sequence[Path]) -> list[str]:
    # Not resolve(): a link has the name that its user knows.
    parts = [Path(os.path.abspath(path)).with_suffix("").parts[1:] for path in paths]
    names: list[str] = []
    for depth in range(1, 1 + max(map(len, parts))):
        names = ["_".join(some[-depth:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    repeated = [str(path) for name, path in zip(names, paths, strict=True) if names.count(name) > 1]
    raise UserError(f"{' and '.join(repeated)}: their pictures would have the same names; take one at a time")
