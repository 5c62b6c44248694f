"""What an allocation can come to at most, before there are any scores."""

from collections.abc import Collection

import torch

from spt_dist.allocation.costs import AllocationRule, block_of
from spt_dist.allocation.kinds import find_kind
from spt_dist.allocation.plan import Plan
from spt_dist.allocation.released import eligible_names, matrix_names
from spt_dist.allocation.request import AllocationRequest
from spt_dist.models.matrices import Inventory, LogicalParameter


def most_trained(request: AllocationRequest, inventory: Inventory) -> int:
    """The most parameters, head not counted, that ``allocate`` makes trainable for a request.

    Raises:
        UserError: as ``allocate``.
    """
    reserved = _reserved(inventory)
    rule, limit = request.resolve(inventory.backbone_size, reserved)
    if limit is None:
        assert request.tau is not None
        # What takes the place of c sensitive weights costs at most alpha c, or beta c for a whole vector.
        return min(int(request.tau * max(rule.alpha, rule.beta or 1)) + reserved, inventory.backbone_size)
    # The published sweep takes the nearest total, below twice the budget.
    return 2 * limit if request.preset == "released" else limit


def densest_plan(request: AllocationRequest, inventory: Inventory) -> Plan:
    """A plan with a tuning module wherever the request allows one; none from any scores keeps more activations.

    It is far above the budget, so its trainable parameters mean nothing.

    Raises:
        UserError: as ``allocate``.
    """
    rule, _ = request.resolve(inventory.backbone_size, _reserved(inventory))
    names = [item.name for item in inventory.parameters if item.name not in inventory.always_tuned]
    matrices = {item.name for item in inventory.parameters if item.is_matrix}
    if request.preset == "released":
        names = eligible_names(names)
        matrices = matrix_names(names, matrices)
    known = inventory.by_name()
    chosen = [known[name] for name in names]
    structured = _structured(rule, chosen, matrices)
    # Single weights keep columns of a layer's input beside what its modules keep of it.
    sparse = {
        item.name: torch.arange(item.matrix_shape[1])
        for item in chosen
        if rule.unstructured and item.name in matrices and (item.name not in structured or _is_keys(item))
    }
    structured = {name: kind for name, kind in structured.items() if name not in sparse}
    vectors = [
        item.name
        for item in chosen
        if item.name not in matrices and (rule.unstructured or (rule.beta is not None and len(item.shape) == 1))
    ]
    blocks = {name: shape for name, shape in _block_shapes(chosen, matrices).items() if name in structured}
    shapes = {
        name: known[name].shape for name in (*structured, *sparse, *vectors, *inventory.always_tuned) if name in known
    }
    return Plan(
        matrices=structured,
        vectors=vectors,
        sparse=sparse,
        parameters=list(inventory.always_tuned),
        head=list(inventory.head),
        shapes=shapes | blocks,
        rank=rule.rank,
        modules=request.module_options(),
        backbone_size=inventory.backbone_size,
    )


def _structured(rule: AllocationRule, chosen: list[LogicalParameter], matrices: Collection[str]) -> dict[str, str]:
    """What could get a module: each matrix, or each block that has matrices."""
    if rule.structured is None:
        return {}
    if find_kind(rule.structured).takes_block:
        return dict.fromkeys(_block_shapes(chosen, matrices), rule.structured)
    return dict.fromkeys((item.name for item in chosen if item.name in matrices), rule.structured)


def _block_shapes(chosen: list[LogicalParameter], matrices: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Each block that has matrices, and its width: what its first matrix reads."""
    blocks: dict[str, tuple[int, ...]] = {}
    for item in chosen:
        block = block_of(item.name)
        if block is not None and item.name in matrices:
            blocks.setdefault(block, item.matrix_shape[1:])
    return blocks


def _is_keys(item: LogicalParameter) -> bool:
    """Whether it is the second third of a fused projection, which gets single weights beside the others' modules."""
    return item.start == item.shape[0]


def _reserved(inventory: Inventory) -> int:
    known = inventory.by_name()
    return sum(known[name].numel for name in inventory.always_tuned)
