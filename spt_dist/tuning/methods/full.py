"""Full fine-tuning: every parameter is trained, in place."""

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.models.matrices import take_inventory
from spt_dist.models.sharded import whole_shape


def plan_full(model: nn.Module) -> Plan:
    """Train everything."""
    inventory = take_inventory(model)
    shapes = {
        name: whole_shape(parameter) for name, parameter in model.named_parameters() if name not in inventory.head
    }
    return Plan(
        parameters=list(shapes),
        head=inventory.head,
        shapes=shapes,
        method="full",
        backbone_size=inventory.backbone_size,
    )
