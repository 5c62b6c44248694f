"""What a plan trains, taken apart: one part for each module, vector or tensor."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from spt_dist.allocation.kinds import find_kind, structured_cost
from spt_dist.allocation.plan import Plan

VECTORS, SINGLE, IN_PLACE = "whole vectors", "single weights", "in place"


@dataclass(frozen=True)
class Part:
    """Something that a plan trains.

    Attributes:
        name: its logical name. What is put on a block is named like a parameter of the block, after its kind:
            ``blocks.3.prompt``.
        way: how it is trained: the kind of its structured module, or ``VECTORS``, ``SINGLE`` or ``IN_PLACE``.
        cost: its trainable parameters.
    """

    name: str
    way: str
    cost: int


def take_apart(plan: Plan) -> list[Part]:
    """Everything that ``plan`` trains but the head; the costs add up to ``plan.num_trainable``.

    Raises:
        UserError: a kind of module is not registered.
    """
    modules = [
        Part(
            f"{name}.{kind}" if find_kind(kind).takes_block else name,
            kind,
            structured_cost(kind, plan.shapes[name], plan.rank),
        )
        for name, kind in plan.matrices.items()
    ]
    return [
        *modules,
        *(Part(name, VECTORS, prod(plan.shapes[name])) for name in plan.vectors),
        *(Part(name, SINGLE, len(indices)) for name, indices in plan.sparse.items()),
        *(Part(name, IN_PLACE, prod(plan.shapes[name])) for name in plan.parameters),
    ]


def kinds_of(plans: Iterable[Plan]) -> list[str]:
    """The kinds of structured modules in any of the plans, by the alphabet."""
    return sorted({kind for plan in plans for kind in plan.matrices.values()})


def cost_by_way(plan: Plan) -> Counter[str]:
    """Way of training, see ``Part`` -> trainable parameters."""
    costs: Counter[str] = Counter()
    for part in take_apart(plan):
        costs[part.way] += part.cost
    return costs
