"""A plan out of a file: one that was made before, or an allocation that others published."""

from pathlib import Path

from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.hosts import rank_zeros_file


def plan_from_file(model: nn.Module, path: str, preset: str = "paper") -> Plan:
    """Read a plan; ``inject`` finds out whether it is for ``model``. Collective: hosts without the file are sent it.

    Args:
        model: the backbone with its head.
        path: a plan file, or a ``param_req_*.pth`` as SPT's authors published them.
        preset: how the modules of a published allocation are set up, see ``Plan.from_spt_release``; other plans say it.

    Raises:
        UserError: as ``Plan.load`` and ``Plan.from_spt_release``; or a preset for a plan that has its own.
    """
    if path.endswith(".pth"):
        with rank_zeros_file(Path(path)) as local:
            return Plan.from_spt_release(local, preset)
    if preset != "paper":
        raise UserError(f"method.preset={preset!r}: is for published allocations (.pth); {path} says it itself")
    with rank_zeros_file(Path(path)) as local:
        return Plan.load(local)
