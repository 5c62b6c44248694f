"""The methods that a config may name, one file each: a function that makes a plan for a model."""

from collections.abc import Callable

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.tuning.methods.adapter import plan_adapter
from spt_dist.tuning.methods.bias import plan_bias
from spt_dist.tuning.methods.full import plan_full
from spt_dist.tuning.methods.linear import plan_linear
from spt_dist.tuning.methods.lora import plan_lora
from spt_dist.tuning.methods.partial import plan_partial
from spt_dist.tuning.methods.plan import plan_from_file
from spt_dist.tuning.methods.vpt import plan_vpt

PlanMaker = Callable[..., Plan]
# SPT is not among them: its plan needs scores, which `allocate` turns into one.
PLAN_MAKERS: dict[str, PlanMaker] = {
    "linear": plan_linear,
    "lora": plan_lora,
    "adapter": plan_adapter,
    "vpt": plan_vpt,
    "bias": plan_bias,
    "partial": plan_partial,
    "full": plan_full,
    "plan": plan_from_file,
}


def make_plan(method: str, model: nn.Module, **options: object) -> Plan:
    """The plan of a method that needs no scores, one of ``PLAN_MAKERS``."""
    return PLAN_MAKERS[method](model, **options)
