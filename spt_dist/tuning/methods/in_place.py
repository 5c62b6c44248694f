"""The model's own parameters trained in place: what full fine-tuning, BIAS and PARTIAL-k have in common."""

from collections.abc import Iterable
from typing import Any

from spt_dist.allocation.plan import Plan
from spt_dist.models.matrices import Inventory


def plan_in_place(inventory: Inventory, names: Iterable[str], method: str, **options: Any) -> Plan:
    """The named parameters, and the head.

    Args:
        inventory: of the model.
        names: of parameters; the head's among them are left out, for they are trained anyway and not counted.
        method: whose plan it is.
        options: how it was made, for the record.
    """
    shapes = {name: inventory.shapes[name] for name in names if name not in inventory.head}
    return Plan(
        parameters=list(shapes),
        head=inventory.head,
        shapes=shapes,
        method=method,
        backbone_size=inventory.backbone_size,
        options=options,
    )
