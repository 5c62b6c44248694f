"""Bad samples that were left out, counted over all ranks."""

import logging

import torch.distributed as dist

from spt_dist.data.loader import Skipped
from spt_dist.data.task import Task
from spt_dist.errors import UserError
from spt_dist.sensitivity.shards import get_rank, world_size

_logger = logging.getLogger(__name__)


def gather_left_out(skipped: Skipped) -> set[int]:
    """Indices of all ranks' bad samples. Collective."""
    if world_size() == 1:
        return set(skipped.indices)
    found: list[set[int]] = [set()] * world_size()
    dist.all_gather_object(found, skipped.indices)
    return set().union(*found)


def tell_left_out(skipped: Skipped, task: Task) -> None:
    """Log, on rank 0, how many held-out samples an evaluation has left out. Collective.

    Raises:
        UserError: on every rank: all of them.
    """
    if not getattr(task.val, "skip_bad", False):
        return
    num_bad = len(gather_left_out(skipped))
    if num_bad == task.num_val:
        raise UserError(f"none of the {num_bad:,} held-out samples can be read, see the warnings above")
    if num_bad and get_rank() == 0:
        _logger.warning("%d of %d held-out samples were left out", num_bad, task.num_val)
