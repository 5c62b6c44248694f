"""Full fine-tuning: every parameter is trained, in place."""

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.models.matrices import take_inventory
from spt_dist.tuning.methods.in_place import plan_in_place


def plan_full(model: nn.Module) -> Plan:
    """Train everything."""
    inventory = take_inventory(model)
    return plan_in_place(inventory, inventory.shapes, "full")
