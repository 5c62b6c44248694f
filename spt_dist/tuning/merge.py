"""Folding what was tuned back into a plain backbone."""

import copy

from torch import nn

from spt_dist.errors import UserError
from spt_dist.tuning.entries import EntryTuned, merge_entries
from spt_dist.tuning.inject import is_tuned, replace_module
from spt_dist.tuning.layers import TunedLinear


def merge(tuned: nn.Module) -> nn.Module:
    """A copy of the model whose plain modules compute what the tuned ones do, at the backbone's own cost.

    Args:
        tuned: from ``inject`` or ``load_delta``; stays as it is.

    Returns:
        The backbone's architecture with all updates added to the weights (sums in float64, then rounded to the
        weights' dtype), all parameters trainable again.

    Raises:
        UserError: the model has not been injected.
    """
    if not is_tuned(tuned):
        raise UserError("merge: this model has no tuning modules; call inject or load_delta first")
    merged = copy.deepcopy(tuned)
    for name, module in list(merged.named_modules()):
        if isinstance(module, TunedLinear):
            replace_module(merged, name, module.to_plain())
        elif isinstance(module, EntryTuned):
            merge_entries(module)
    del merged.spt_plan, merged.spt_fingerprint
    return merged.requires_grad_(True)
