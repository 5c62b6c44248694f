"""Tuning of biases alone (BIAS in VPT's tables; TinyTL, Cai et al. 2020; BitFit, Ben Zaken et al. 2022)."""

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.models.matrices import take_inventory
from spt_dist.tuning.methods.in_place import plan_in_place


def plan_bias(model: nn.Module) -> Plan:
    """Every bias of the backbone, in place, and the head.

    As in VPT's code, whatever has "bias" in its name is one: the biases of norms and of the patch embedding, and also
    Swin's tables of relative position biases.
    """
    inventory = take_inventory(model)
    return plan_in_place(inventory, (name for name in inventory.shapes if "bias" in name), "bias")
