"""The same modules in every block, without any scores: what the methods LoRA and Adapter have in common."""

from collections.abc import Sequence

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.models.matrices import operation_of, own_name_of, parent_of, take_inventory


def plan_uniform(model: nn.Module, kind: str, rank: int, targets: Sequence[str]) -> Plan:
    """A module of ``kind`` on the named operations of every block, and the head.

    Args:
        model: the backbone with its head.
        kind: of the modules, one that is put on a matrix ("lora", "adapter"); it also names the method.
        rank: size of each module.
        targets: operations, by the last part of their logical module name: "q", "k", "v", "proj", "fc1", "fc2",
            ConvNeXt's "conv_dw". Numbers don't count.

    Raises:
        UserError: a target names no matrix of the model; ``rank`` below 1.
    """
    if rank < 1:
        raise UserError(f"method.rank={rank}: has to be at least 1")
    inventory = take_inventory(model)
    shapes = {parameter.name: parameter.shape for parameter in inventory.parameters if parameter.is_matrix}
    operations = {name: own_name_of(operation_of(parent_of(name))) for name in shapes}
    known = sorted(filter(None, set(operations.values())))
    for target in targets:
        if target not in known:
            has = ", ".join(known) or "none with a name"
            raise UserError(f"method.targets: {target!r} is no operation of this model; it has {has}")
    chosen = {name: shape for name, shape in shapes.items() if operations[name] in targets}
    return Plan(
        matrices=dict.fromkeys(chosen, kind),
        head=inventory.head,
        shapes=chosen,
        rank=rank,
        method=kind,
        backbone_size=inventory.backbone_size,
        options={"targets": list(targets)},
    )
