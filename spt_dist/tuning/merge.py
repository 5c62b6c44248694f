"""Folding what was tuned back into a plain backbone, and taking it out again."""

import copy
import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.matrices import parent_of
from spt_dist.models.wrappers import unwrap
from spt_dist.tuning.delta import attach_delta, read_delta
from spt_dist.tuning.entries import EntryTuned, merge_entries
from spt_dist.tuning.inject import install, is_tuned, replace_module
from spt_dist.tuning.prompts import Prompts
from spt_dist.tuning.registry import is_mergeable
from spt_dist.tuning.tuned import TunedLayer

logger = logging.getLogger(__name__)


def merge(tuned: nn.Module) -> nn.Module:
    """A copy of the model whose plain modules compute what the tuned ones do, at the backbone's own cost.

    Low-rank modules, single weights, vectors and tokens go into the weights. Adapters, prompts and other modules that
    no weight can stand for stay where they are, and a warning says so: the result is then a tuned model on a backbone
    that has all the rest in its weights.

    Args:
        tuned: from ``inject`` or ``load_delta``; stays as it is.

    Returns:
        The backbone's architecture with all updates added to the weights (sums in float64, then rounded to the
        weights' dtype), all parameters trainable again (not so if modules stay).

    Raises:
        UserError: the model has not been injected.
    """
    tuned = unwrap(tuned)
    if not is_tuned(tuned):
        raise UserError("merge: this model has no tuning modules; call inject or load_delta first")
    merged = copy.deepcopy(tuned)
    plan = merged.spt_plan
    assert isinstance(plan, Plan)
    staying = _take_apart(merged)
    merged.requires_grad_(True)
    left = {name: kind for name, kind in plan.matrices.items() if not is_mergeable(kind)}
    if not left:
        return merged
    logger.warning(
        "merge: %d modules stay beside the merged weights (%s): what they compute is no update of a weight, so the "
        "model keeps them and their cost",
        len(left),
        ", ".join(sorted(set(left.values()))),
    )
    rest = replace(plan, matrices=left, vectors=[], sparse={}, parameters=[])
    return install(merged, rest, staying, fingerprint(merged))


def unmerge(merged: nn.Module, path: str | Path) -> nn.Module:
    """A copy of a merged model with the updates of the task file that went into it taken away again.

    Args:
        merged: from ``merge`` (or its weights loaded into the architecture), the task's head included; stays as it is.
        path: the task file.

    Returns:
        The backbone, its weights as before up to the two roundings to their dtype (of the merged and of these); what
        was trained in place outside the head is restored bit for bit. The head stays the task's.

    Raises:
        UserError: the file is missing or damaged; the model is the backbone itself, or has another head or token than
            the task; or the file can't tell what the backbone was, since all of it was trained in place.
    """
    task = read_delta(path)
    merged = unwrap(merged)
    if is_tuned(merged):
        raise UserError(f"{path}: not all of it was merged into this model, which has tuning modules; take it as it is")
    if fingerprint(merged) == task.fingerprint:
        raise UserError(f"{path}: nothing was merged into this model, it is the task's backbone")
    backbone = copy.deepcopy(merged)
    for name in [*task.plan.parameters, *task.plan.head]:
        given = dict(backbone.named_parameters()).get(name)
        if given is None or name not in task.state or not torch.equal(given.cpu(), task.state[name].to(given.dtype)):
            raise UserError(f"{path}: this model was not merged from it, since their {name} differ")
    unknown = [name for name in task.plan.parameters if name not in task.originals]
    if unknown:
        raise UserError(f"{path}: does not hold what {unknown[0]} was before training; load the backbone anew instead")
    tuned = attach_delta(backbone, task)
    _take_apart(tuned, sign=-1)
    for name, value in task.originals.items():
        tuned.get_parameter(name).data.copy_(value)
    return tuned.requires_grad_(True)


def _take_apart(tuned: nn.Module, sign: int = 1) -> dict[str, nn.Module]:
    """Make a tuned model plain, in place, with the updates times ``sign`` in its weights.

    Returns:
        What no weight can hold, in the form of ``make_modules``.
    """
    from spt_dist.tuning.mlp import restore_plain

    restore_plain(tuned)
    staying: dict[str, nn.Module] = {}
    for name, module in list(tuned.named_modules()):
        if isinstance(module, TunedLayer):
            plain = module.to_plain(sign)
            replace_module(tuned, name, plain)
            rest = module.without_merged(plain)
            if rest.structured:
                staying[name] = rest
        elif isinstance(module, EntryTuned):
            merge_entries(module, sign)
        elif isinstance(module, Prompts):
            staying[parent_of(name)] = module
            module.detach(tuned.get_submodule(parent_of(name)))
    del tuned.spt_plan, tuned.spt_fingerprint, tuned.spt_originals
    return staying
