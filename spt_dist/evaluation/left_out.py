"""Bad samples that were left out, counted over all ranks."""

import logging

from spt_dist.data.loader import Skipped, leaves_out_bad
from spt_dist.data.task import Task
from spt_dist.errors import UserError
from spt_dist.ranks import from_all_ranks
from spt_dist.sensitivity.shards import get_rank

_logger = logging.getLogger(__name__)


def gather_left_out(skipped: Skipped) -> set[int]:
    """Indices of all ranks' bad samples. Collective."""
    return set().union(*from_all_ranks(skipped.indices))


def tell_left_out(skipped: Skipped, task: Task) -> None:
    """Log, on rank 0, how many held-out samples an evaluation has left out. Collective.

    Raises:
        UserError: on every rank: all of them.
    """
    if not leaves_out_bad(task.val):
        return
    num_bad = len(gather_left_out(skipped))
    if num_bad == task.num_val:
        raise UserError(f"none of the {num_bad:,} held-out samples can be read, see the warnings above")
    if num_bad and get_rank() == 0:
        _logger.warning("%d of %d held-out samples were left out", num_bad, task.num_val)
