"""Tuning of the last blocks alone (PARTIAL-k in VPT's tables)."""

import re

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.models.matrices import in_modules, take_inventory
from spt_dist.tuning.methods.in_place import plan_in_place

# timm's names: of plain ViTs, and within the stages of Swin, ConvNeXt and others.
_BLOCK = re.compile(r"(backbone\.)?((layers|stages)\.\d+\.)?blocks\.\d+")


def plan_partial(model: nn.Module, num_blocks: int = 1) -> Plan:
    """The last blocks and what is behind them, in place, and the head.

    Blocks are counted over all stages. What lies between two trained blocks is trained too: of Swin-B, four blocks are
    the last stage, two blocks of the one before it and the downsampling between the two, as in VPT's code. Behind them
    is a norm, ``norm``, ``fc_norm`` or ConvNeXt's ``head.norm``, and in a SigLIP also the pooling by attention. VPT's
    code leaves MoCo v3's norm frozen.

    Args:
        model: the backbone with its head.
        num_blocks: how many blocks.

    Raises:
        UserError: ``num_blocks`` below 1, or more than the model has; or its blocks can't be told.
    """
    # A list of lists (Twins) is stages, which other layers may join in another order than the names'.
    blocks = [
        name
        for name, module in model.named_modules()
        if _BLOCK.fullmatch(name) and not isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    if not blocks:
        raise UserError(
            f"method.type='partial': the blocks of this {type(model).__name__} can't be told; they have to be named as "
            "those of timm's ViTs, Swins and ConvNeXts ('blocks.0', 'stages.0.blocks.0')"
        )
    inventory = take_inventory(model)
    if not 1 <= num_blocks <= len(blocks):
        raise UserError(
            f"method.num_blocks={num_blocks}: has to be at least 1, and at most the {len(blocks)} blocks that this "
            f"{type(model).__name__} has"
        )
    names = list(inventory.shapes)
    # Models name their parts in the order in which images pass them.
    first = next(place for place, name in enumerate(names) if in_modules(name, [blocks[-num_blocks]]))
    return plan_in_place(inventory, names[first:], "partial", num_blocks=num_blocks)
