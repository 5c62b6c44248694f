"""The order in which a rank's samples go through the model: split to size, and in step with the other ranks."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from spt_dist.errors import UserError
from spt_dist.sensitivity.agreement import announce_failure
from spt_dist.sensitivity.nested import batch_size, check_separable, take
from spt_dist.sensitivity.shards import collective_device, world_size

Batch = tuple[Any, Any]


def micro_batches(batches: Iterable[Batch], size: Callable[[], int | None]) -> Iterator[Batch]:
    """Split batches into parts of at most ``size()`` samples, asked anew for each; ``None`` for no limit.

    Raises:
        UserError: an item is no pair ``(inputs, targets)``.
    """
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise UserError(f"batches: an item has to be a pair (inputs, targets), not {type(batch).__name__}")
        inputs, targets = batch
        num_samples = batch_size(inputs)
        if num_samples > 1:
            for what, part in (("inputs", inputs), ("targets", targets)):
                _check(what, part)
        start = 0
        while start < num_samples:
            rows = slice(start, start + (size() or num_samples))
            yield take(inputs, rows), take(targets, rows)
            start = rows.stop


def _check(what: str, part: Any) -> None:
    try:
        check_separable(part)
    except UserError as error:
        raise UserError(f"batches: in the {what} {error}; make it a tensor") from error


def in_lockstep(stream: Iterator[Batch], has_failed: Callable[[], bool]) -> Iterator[tuple[Batch, bool]]:
    """As many items on every rank as on the one that has most; ends on all once one ``has_failed``. Collective.

    Yields:
        ``(batch, is_own)``: a rank that has no more of its own gets its last one again, or, if it never had one,
        another rank's; it is to run it, for the collectives inside, and to leave it out of the result.
    """
    spare: Batch | None = None
    error: Exception | None = None
    while True:
        try:
            item = next(stream, None)
        except Exception as raised:  # whatever it is, the other ranks have to be told before it goes on its way
            item, error = None, raised
        failed = has_failed() or error is not None
        status = torch.tensor([item is not None, failed, item is None and spare is None], dtype=torch.int32)
        most = status.to(collective_device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        anyone_has, anyone_failed, anyone_lacks = most.tolist()
        if error is not None:
            announce_failure(error)
            raise error
        if not anyone_has or anyone_failed:
            return
        if anyone_lacks:
            lent = _lend(item)
            spare = lent if spare is None else spare
        if item is not None:
            spare = item
        assert spare is not None
        yield spare, item is not None


def _lend(item: Batch | None) -> Batch:
    """One rank's item for those that have none. Collective."""
    offers: list[bool] = [False] * world_size()
    dist.all_gather_object(offers, item is not None)
    lender = offers.index(True)
    lent = [item]
    dist.broadcast_object_list(lent, src=lender)
    assert lent[0] is not None
    return lent[0]
