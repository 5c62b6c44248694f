"""spt_dist: distributed, sensitivity-aware, parameter-efficient fine-tuning of vision Transformers."""

from spt_dist.compat import declare_mmcv_ops, declare_torchvision_ops

declare_torchvision_ops()
declare_mmcv_ops()

from spt_dist.allocation.allocate import allocate  # noqa: E402
from spt_dist.allocation.plan import Plan  # noqa: E402
from spt_dist.errors import UserError  # noqa: E402
from spt_dist.sensitivity.estimator import estimate_sensitivity  # noqa: E402
from spt_dist.sensitivity.scores import Scores  # noqa: E402
from spt_dist.tuning.delta import load_delta, save_delta  # noqa: E402
from spt_dist.tuning.export.hub import save_pretrained  # noqa: E402
from spt_dist.tuning.export.peft import load_peft, save_peft  # noqa: E402
from spt_dist.tuning.inject import inject, print_trainable_parameters, trainable_parameters  # noqa: E402
from spt_dist.tuning.merge import merge, unmerge  # noqa: E402
from spt_dist.tuning.multitask.bank import TaskBank  # noqa: E402
from spt_dist.tuning.registry import register_structured  # noqa: E402
from spt_dist.tuning.structured import ModuleSpec, StructuredModule  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "ModuleSpec",
    "Plan",
    "Scores",
    "StructuredModule",
    "TaskBank",
    "UserError",
    "allocate",
    "estimate_sensitivity",
    "inject",
    "load_delta",
    "load_peft",
    "merge",
    "print_trainable_parameters",
    "register_structured",
    "save_delta",
    "save_peft",
    "save_pretrained",
    "trainable_parameters",
    "unmerge",
]
