"""Prompts in every block (VPT-deep, Jia et al. 2022)."""

from torch import nn

from spt_dist.allocation.costs import block_of
from spt_dist.allocation.kinds import ModuleOptions
from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.models.matrices import take_inventory
from spt_dist.models.sharded import whole_shape
from spt_dist.tuning.prompts import check_block


def plan_vpt(model: nn.Module, num_prompts: int = 10, dropout: float = 0.0) -> Plan:
    """Prompts of its own for each block of the backbone, and the head.

    Args:
        model: the backbone with its head.
        num_prompts: prompts a block; ``num_prompts * width`` parameters each.
        dropout: on the prompts, in training.

    Raises:
        UserError: ``num_prompts`` below 1; ``dropout`` out of range; the model has no blocks, or blocks that do not
            take any number of tokens (Swin, ConvNeXt).
    """
    if num_prompts < 1:
        raise UserError(f"method.num_prompts={num_prompts}: has to be at least 1")
    inventory = take_inventory(model)
    matrices = [parameter.name for parameter in inventory.parameters if parameter.is_matrix]
    names = list(dict.fromkeys(filter(None, map(block_of, matrices))))
    if not names:
        raise UserError(f"method.type='vpt': this {type(model).__name__} has no blocks to put prompts into; use a ViT")
    shapes = {name: whole_shape(check_block(model, name).get_parameter("norm1.weight")) for name in names}
    return Plan(
        matrices=dict.fromkeys(shapes, "prompt"),
        head=inventory.head,
        shapes=shapes,
        rank=num_prompts,
        modules=ModuleOptions(dropout=dropout),
        method="vpt",
        backbone_size=inventory.backbone_size,
    )
