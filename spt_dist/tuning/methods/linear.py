"""Linear probe: only the head is trained."""

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.models.matrices import take_inventory


def plan_linear(model: nn.Module) -> Plan:
    """Train the head, freeze the backbone."""
    inventory = take_inventory(model)
    return Plan(head=inventory.head, method="linear", backbone_size=inventory.backbone_size)
