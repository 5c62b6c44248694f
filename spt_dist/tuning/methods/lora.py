"""LoRA with the same modules in every block (Hu et al. 2021)."""

from collections.abc import Sequence

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.tuning.methods.uniform import plan_uniform


def plan_lora(model: nn.Module, rank: int = 8, targets: Sequence[str] = ("q", "v")) -> Plan:
    """A low-rank module on the named operations of every block, and the head.

    Args:
        model: the backbone with its head.
        rank: rank of each module; ``rank * (in_features + out_features)`` parameters a matrix.
        targets: operations, by the last part of their logical module name: "q", "k", "v", "proj", "fc1", "fc2".

    Raises:
        UserError: a target names no matrix of the model; ``rank`` below 1.
    """
    return plan_uniform(model, "lora", rank, targets)
