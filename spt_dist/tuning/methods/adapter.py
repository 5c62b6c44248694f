"""Bottleneck adapters at the same places of every block (Houlsby et al. 2019)."""

from collections.abc import Sequence

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.tuning.methods.uniform import plan_uniform


def plan_adapter(model: nn.Module, rank: int = 8, targets: Sequence[str] = ("fc2",)) -> Plan:
    """An adapter behind the named operations of every block, and the head.

    With the default ``targets`` it is what comparisons call Adapter-k, k the ``rank``: one adapter a block, behind the
    MLP and within its residual branch. All start as the identity.

    Args:
        model: the backbone with its head.
        rank: width of each adapter; ``2 * rank * out_features + rank + out_features`` parameters an operation.
        targets: operations, by the last part of their logical module name: "q", "k", "v", "proj", "fc1", "fc2".

    Raises:
        UserError: a target names no matrix of the model; ``rank`` below 1.
    """
    return plan_uniform(model, "adapter", rank, targets)
