"""Stage 1: one pass over some samples that scores every eligible weight.

With all weights frozen, the backward pass computes gradients of activations only. A hook on each layer sees its
input and the gradient of its output, from which a rule forms that layer's per-sample squared gradients on the spot:
the arithmetic of an ordinary backward, and no parameter ever gets a ``.grad``.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.errors import UserError
from spt_dist.models.matrices import Inventory, take_inventory
from spt_dist.sensitivity.nested import batch_size, map_tensors, micro_batches, take
from spt_dist.sensitivity.rules import find_rule
from spt_dist.sensitivity.scores import ScoreInfo, Scores
from spt_dist.sensitivity.shards import FlatIndex, all_sum, reduce_to_shard

CRITERIA = ("per_sample", "batch")
LossFunction = Callable[[Any, Any], Tensor]
logger = logging.getLogger(__name__)


def estimate_sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFunction,
    criterion: str = "per_sample",
    *,
    train_mode: bool = False,
    dtype: torch.dtype | None = None,
    micro_batch: int | None = None,
    sample_ids: list[int] | None = None,
) -> Scores:
    """Score every eligible weight of ``model``: ``s_n = sum_i (dE_i / dw_n)^2`` (SPT, Algorithm 1).

    ``E_i`` is the loss of sample ``i`` alone, whatever the reduction of ``loss_fn``; so scores do not depend on how
    samples are batched or spread over ranks, up to rounding. With several ranks every rank passes its own share of
    the samples (shares may differ in size) and the result is their sum.

    Args:
        model: any module whose layers the rules cover; left as it was. Samples lie along axis 0.
        batches: yields ``(inputs, targets)``: tensors, or tuples, lists and dicts of them.
        loss_fn: ``loss_fn(outputs, targets)`` returns a scalar or one value a sample, shape ``(B,)``.
        criterion: "per_sample"; or "batch": the square of the gradient of the mean loss over each item of
            ``batches``, summed over items (what the published code computes).
        train_mode: run with dropout and drop-path active.
        dtype: run forward and backward under autocast to this dtype; scores are summed in fp32.
        micro_batch: split batches to at most this many samples at a time to save memory ("per_sample" only).
        sample_ids: ids of all samples, to be saved with the scores.

    Returns:
        The scores, in equal parts over the ranks.

    Raises:
        UserError: no samples; an unknown criterion; a model that cannot be scored; a score that is not finite.
    """
    _check_options(criterion, micro_batch)
    inventory = take_inventory(model)
    if not inventory.parameters:
        raise UserError(f"{type(model).__name__} has no Linear or LayerNorm layer outside its head: nothing to score")
    _log_skipped(inventory)
    index = FlatIndex(
        tuple(parameter.name for parameter in inventory.parameters),
        tuple(parameter.shape for parameter in inventory.parameters),
    )
    device = next(model.parameters()).device
    local = torch.zeros(index.total, dtype=torch.float32, device=device)
    collector = _Collector(model, inventory, index, local, per_sample=criterion == "per_sample")
    with _scoring_mode(model, train_mode), collector.attached():
        num_samples = _run_batches(model, batches, loss_fn, collector, dtype, micro_batch)
    total = int(all_sum(torch.tensor(num_samples, device=device)))
    if total == 0:
        raise UserError("batches is empty: the sensitivity needs at least one sample")
    shapes = {name: list(model.get_parameter(name).shape) for name in inventory.always_tuned}
    info = ScoreInfo(
        criterion, total, train_mode, inventory.head, shapes, inventory.skipped, inventory.backbone_size, sample_ids
    )
    scores = Scores(reduce_to_shard(index, local), info)
    scores.check_finite()
    return scores


def _run_batches(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFunction,
    collector: "_Collector",
    dtype: torch.dtype | None,
    micro_batch: int | None,
) -> int:
    """Forward and backward over every batch; returns the number of samples."""
    device = next(model.parameters()).device
    num_samples = 0
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise UserError(f"batches: an item has to be a pair (inputs, targets), not {type(batch).__name__}")
        inputs, targets = (map_tensors(part, lambda tensor: tensor.to(device)) for part in batch)
        for some_inputs, some_targets in micro_batches(inputs, targets, micro_batch):
            collector.learn_rows(take(some_inputs, slice(1)))
            collector.start(batch_size(some_inputs))
            with torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
                outputs = model(some_inputs)
                collector.check_all_called()
                loss = _total_loss(loss_fn, outputs, some_targets, collector.num_samples)
            (loss if collector.per_sample else loss / collector.num_samples).backward()
            num_samples += collector.num_samples
    return num_samples


class _Collector:
    """Hooks that feed each layer's input and output gradient to its rule."""

    def __init__(
        self, model: nn.Module, inventory: Inventory, index: FlatIndex, flat: Tensor, per_sample: bool
    ) -> None:
        self.model = model
        self.per_sample = per_sample
        self.num_samples = 0
        self.learning = False
        self.calls: Counter[str] = Counter()
        self.rows_of_one_sample: dict[str, int] = {}
        self.buffers: dict[str, dict[str, Tensor]] = {}
        for place, parameter in enumerate(inventory.parameters):
            if parameter.start == 0:
                # The q, k and v rows of a fused projection follow one another, so one view spans the parameter.
                shape = model.get_submodule(parameter.module).get_parameter(parameter.parameter).shape
                start = index.offsets[place]
                view = flat[start : start + prod(shape)].view(shape)
                self.buffers.setdefault(parameter.module, {})[parameter.parameter] = view

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on every scored module for the length of the block."""
        modules = [(name, self.model.get_submodule(name)) for name in self.buffers]
        handles = [
            module.register_forward_hook(partial(self._after_forward, name), with_kwargs=True)
            for name, module in modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def learn_rows(self, one_sample: Any) -> None:
        """Note, the first time, how many rows each layer's input has for one sample (windows of attention, say).

        It tells layers that don't work sample by sample, whose scores would be silently wrong.
        """
        if self.rows_of_one_sample:
            return
        self.learning = True
        with _in_mode(self.model, train=False):
            self.model(one_sample)
        self.learning = False

    def start(self, num_samples: int) -> None:
        """Begin a forward pass over ``num_samples`` samples."""
        self.num_samples = num_samples
        self.calls.clear()

    def check_all_called(self) -> None:
        """Every scored module must have run once: otherwise its scores would be silently wrong."""
        for name in self.buffers:
            if self.calls[name] == 0:
                raise UserError(
                    f"{name}: never called in the forward pass; it is unused (take it out of the model), or its weight "
                    "is used functionally, where no score can be found"
                )
            if self.calls[name] > 1:
                raise UserError(
                    f"{name}: called {self.calls[name]} times in one forward pass; a layer that is used in several "
                    "places can't be scored"
                )

    def _after_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if self.learning:
            self.rows_of_one_sample[name] = len(_input_of(args, kwargs))
            return output
        self.calls[name] += 1
        if not output.requires_grad:
            # With all weights frozen nothing needs gradients until the first scored layer: the graph starts here. The
            # copy is no leaf, so that an activation may work on it in place.
            output = output.detach().requires_grad_().clone()
        inputs = _input_of(args, kwargs).detach()
        rows = self.rows_of_one_sample.get(name)
        if self.per_sample and rows is not None and len(inputs) != self.num_samples * rows:
            raise UserError(
                f"{name}: its input has shape {tuple(inputs.shape)} for {self.num_samples} samples and "
                f"{rows} rows for one; samples must lie along the outermost axis. "
                "With micro_batch=1 any layout will do"
            )
        output.register_hook(partial(self._after_backward, name, module, inputs))
        return output

    @torch.no_grad()
    def _after_backward(self, name: str, module: nn.Module, inputs: Tensor, grads: Tensor) -> None:
        rule = find_rule(module)
        assert rule is not None
        rule(module, inputs, grads, self.num_samples if self.per_sample else 1, self.buffers[name])


@contextmanager
def _scoring_mode(model: nn.Module, train_mode: bool) -> Iterator[None]:
    """Freeze all weights and set the mode; put everything back afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with _in_mode(model, train_mode), torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _in_mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Training or eval mode for the length of the block; each module then gets its own back."""
    modes = {module: module.training for module in model.modules()}
    model.train(train)
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a layer was called with."""
    inputs: Tensor = args[0] if args else kwargs["input"]
    return inputs


def _total_loss(loss_fn: LossFunction, outputs: Any, targets: Any, num_samples: int) -> Tensor:
    """Sum over the batch of each sample's own loss, whatever reduction ``loss_fn`` uses."""
    losses = loss_fn(outputs, targets)
    if not isinstance(losses, Tensor) or not losses.requires_grad:
        raise UserError(
            f"loss_fn returned {type(losses).__name__} that does not depend on the model's layers; it has to return a "
            "tensor computed from the outputs, with gradients"
        )
    if losses.ndim == 1 and len(losses) == num_samples:
        return losses.sum()
    if losses.ndim != 0:
        raise UserError(
            f"loss_fn returned shape {tuple(losses.shape)} for {num_samples} samples; "
            "it has to return a scalar or one value a sample"
        )
    if num_samples == 1:
        return losses
    # A scalar may be a mean, a sum or weighted: applied to one sample at a time it is that sample's own loss.
    rows = [slice(i, i + 1) for i in range(num_samples)]
    return torch.stack([loss_fn(take(outputs, row), take(targets, row)) for row in rows]).sum()


def _check_options(criterion: str, micro_batch: int | None) -> None:
    if criterion not in CRITERIA:
        raise UserError(f"criterion={criterion!r}: choose one of {', '.join(CRITERIA)}")
    if micro_batch is not None and micro_batch < 1:
        raise UserError(f"micro_batch={micro_batch}: has to be at least 1")
    if micro_batch is not None and criterion == "batch":
        raise UserError('micro_batch would change the batches that criterion="batch" is defined on; leave it out')


def _log_skipped(inventory: Inventory) -> None:
    if not inventory.head:
        logger.warning("no classification head found (get_classifier): none is set aside to be trained whole")
    if inventory.skipped:
        listed = ", ".join(f"{name} ({reason})" for name, reason in inventory.skipped.items())
        logger.info("not scored: %s", listed)
