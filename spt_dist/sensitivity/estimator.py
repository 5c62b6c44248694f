"""Stage 1: one pass over some samples that scores every eligible weight.

With all weights frozen, the backward pass computes gradients of activations only. A tap on each layer sees its input
and the gradient of its output, from which a rule forms that layer's per-sample squared gradients on the spot: the
arithmetic of an ordinary backward, and no parameter ever gets a ``.grad``. Parameters outside such layers are followed
from the operations that use them.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from spt_dist.errors import UserError
from spt_dist.models.matrices import take_inventory
from spt_dist.models.sharded import is_sharded
from spt_dist.models.wrappers import unwrap
from spt_dist.sensitivity.agreement import announce_failure, exchange
from spt_dist.sensitivity.diagnosis import NotFiniteError, explain
from spt_dist.sensitivity.losses import LossFunction
from spt_dist.sensitivity.memory import count_saved_bytes
from spt_dist.sensitivity.modes import scoring_mode
from spt_dist.sensitivity.nested import batch_size, map_tensors
from spt_dist.sensitivity.scores import ScoreInfo, Scores
from spt_dist.sensitivity.scoring import PassOptions, ScoringPass
from spt_dist.sensitivity.shards import all_max, all_sum, get_rank, world_size
from spt_dist.sensitivity.streams import Batch, in_lockstep, micro_batches

CRITERIA = ("per_sample", "batch")
logger = logging.getLogger(__name__)


def estimate_sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFunction,
    criterion: str = "per_sample",
    *,
    train_mode: bool = False,
    dtype: torch.dtype | None = None,
    micro_batch: int | None = None,
    memory_limit: int | None = None,
    shard_sums: bool | None = None,
    sample_ids: list[int] | None = None,
) -> Scores:
    """Score every eligible weight of ``model``: ``s_n = sum_i (dE_i / dw_n)^2`` (SPT, Algorithm 1).

    ``E_i`` is the loss of sample ``i`` alone, whatever the reduction of ``loss_fn``: scores refer to the sum-reduced
    loss, and do not depend on how samples are batched or spread over ranks, up to rounding. With several ranks every
    rank passes its own share of the samples (shares may differ in size) and the result is their sum.

    Args:
        model: any module whose layers the rules cover, also inside DistributedDataParallel, sharded by FSDP2 or in
            DeepSpeed's engine; left as it was. Samples lie along axis 0.
        batches: yields ``(inputs, targets)``: tensors, or tuples, lists and dicts of them.
        loss_fn: ``loss_fn(outputs, targets)`` returns a scalar or one value a sample, shape ``(B,)``.
        criterion: "per_sample"; or "batch": the square of the gradient of the mean loss over each item of
            ``batches``, summed over items (what the published code computes).
        train_mode: run with dropout and drop-path active.
        dtype: run forward and backward under autocast to this dtype; scores are summed in fp32.
        micro_batch: split batches to at most this many samples at a time to save memory ("per_sample" only).
        memory_limit: split them so that a micro-batch keeps at most this many bytes of activations for its backward
            pass, as far as the first sample tells ("per_sample" only).
        shard_sums: whether each rank keeps a part of the sums (N / W floats and two buckets of 32 MiB; ranks run in
            lockstep) or all of them (N floats; one exchange at the end). ``None`` shards them for models whose
            parameters are sharded. The log tells which.
        sample_ids: ids of all samples, to be saved with the scores.

    Returns:
        The scores, in equal parts over the ranks.

    Raises:
        UserError: no samples; an unknown criterion; a model that cannot be scored. On every rank alike, naming layer,
            rank and sample (``NotFiniteError``), if a score comes out NaN or infinite.
    """
    _check_options(criterion, micro_batch, memory_limit)
    model = unwrap(model)
    inventory = take_inventory(model)
    if not inventory.parameters:
        raise UserError(f"{type(model).__name__} has no weight outside its head: nothing to score")
    device = next(model.parameters()).device
    # Sharded weights are gathered by all ranks together, and so are sharded sums sent.
    lockstep = world_size() > 1 and (is_sharded(model) or bool(shard_sums))
    options = PassOptions(criterion == "per_sample", dtype, lockstep, shard_sums)
    scoring = ScoringPass(model, inventory, loss_fn, options, device)
    run = _Run(scoring, options, device, micro_batch, memory_limit)
    with scoring_mode(model, train_mode), scoring.attached():
        try:
            run.over(batches)
        except Exception as error:
            # In lockstep it may have come in the middle of the others' collectives, where nothing can be told.
            if not lockstep:
                announce_failure(error)
            raise
    shard = scoring.finish()
    total = int(all_sum(torch.tensor(run.num_samples, device=device)))
    if get_rank() == 0:
        logger.info(inventory.summary(scoring.skipped))
        _log_skipped(inventory.head, scoring.skipped)
    shapes = {item.name: list(item.shape) for item in inventory.parameters}
    info = ScoreInfo(
        criterion=criterion,
        loss_reduction="sum" if options.per_sample else "mean",
        num_samples=total,
        train_mode=train_mode,
        head=inventory.head,
        always_tuned={name: shapes[name] for name in inventory.always_tuned},
        skipped=scoring.skipped,
        matrices=[item.name for item in scoring.parameters if item.is_matrix],
        backbone_size=inventory.backbone_size,
        sample_ids=sample_ids,
    )
    scores = Scores(shard, info)
    scores.check_finite()
    return scores


class _Run:
    """The batches' way through a scoring pass, on this rank."""

    def __init__(
        self,
        scoring: ScoringPass,
        options: PassOptions,
        device: torch.device,
        micro_batch: int | None,
        memory_limit: int | None,
    ) -> None:
        self.num_samples = 0
        self._failed = False
        self._scoring = scoring
        self._per_sample = options.per_sample
        self._device = device
        self._size = micro_batch
        self._memory_limit = memory_limit
        self._started = False
        self._lockstep = options.lockstep

    def over(self, batches: Iterable[Batch]) -> None:
        """Run all batches, and end on all ranks alike if one comes upon NaN or infinity. Collective."""
        stream = micro_batches(batches, self._next_size)
        steps = in_lockstep(stream, lambda: self._failed) if self._lockstep else _alone(stream)
        last: Batch | None = None
        for batch, is_own in steps:
            inputs, targets = (map_tensors(part, lambda tensor: tensor.to(self._device)) for part in batch)
            self._scoring.add(inputs, targets, counts=is_own)
            if not self._started:
                self._start(inputs, targets)
            last = (inputs, targets)
            if is_own:
                self.num_samples += batch_size(inputs)
                self._failed = self._scoring.failed
            if self._failed and not self._lockstep:
                break
        self._scoring.join()
        self._raise_failure(last)

    def _next_size(self) -> int | None:
        """How many samples to take at once. The first goes alone, and tells how many rows one sample has in a layer."""
        return self._size if self._started or not self._per_sample else 1

    def _start(self, inputs: Any, targets: Any) -> None:
        """What the first samples are for, besides their scores."""
        self._started = True
        if self._memory_limit is not None:
            saved = count_saved_bytes(self._scoring, inputs, targets)
            fitting = max(1, self._memory_limit // saved)
            self._size = fitting if self._size is None else min(self._size, fitting)

    def _raise_failure(self, last: Batch | None) -> None:
        """Tell every rank of the first one's failure."""
        failures = exchange(self._failed)
        if not any(failures):
            return
        found: NotFiniteError | None = None
        if self._failed or self._lockstep:
            assert last is not None
            size = batch_size(last[0])
            # In lockstep all ranks go through the same number of passes, and those that have not failed find nothing.
            rounds = all_max(size) if self._lockstep else size
            found = explain(self._scoring, *last, get_rank(), self.num_samples - size, rounds)
        raise next(error for error in exchange(found if self._failed else None) if error is not None)


def _alone(stream: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    return ((batch, True) for batch in stream)


def _check_options(criterion: str, micro_batch: int | None, memory_limit: int | None) -> None:
    if criterion not in CRITERIA:
        raise UserError(f"criterion={criterion!r}: choose one of {', '.join(CRITERIA)}")
    for name, value in (("micro_batch", micro_batch), ("memory_limit", memory_limit)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: has to be at least 1")
        if value is not None and criterion == "batch":
            raise UserError(f'{name} would change the batches that criterion="batch" is defined on; leave it out')


def _log_skipped(head: list[str], skipped: dict[str, str]) -> None:
    if not head:
        logger.warning("no classification head found (get_classifier): none is set aside to be trained whole")
    if skipped:
        logger.warning("not scored: %s", ", ".join(f"{name} ({reason})" for name, reason in skipped.items()))
