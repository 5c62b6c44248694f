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
        inputs, targets = (_map(part, lambda tensor: tensor.to(device)) for part in batch)
        for some_inputs, some_targets in _micro_batches(inputs, targets, micro_batch):
            collector.start(_batch_size(some_inputs))
            with torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
                loss = _total_loss(loss_fn, model(some_inputs), some_targets, collector.num_samples)
            collector.check_all_called()
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
        self.calls: Counter[str] = Counter()
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
        handles = [module.register_forward_hook(partial(self._after_forward, name)) for name, module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, num_samples: int) -> None:
        """Begin a forward pass over ``num_samples`` samples."""
        self.num_samples = num_samples
        self.calls.clear()

    def check_all_called(self) -> None:
        """Every scored module must have run once: otherwise its scores would be silently wrong."""
        for name in self.buffers:
            if self.calls[name] != 1:
                raise UserError(
                    f"{name}: called {self.calls[name]} times in one forward pass; a module whose weights are used "
                    "functionally, shared between places or re-computed (activation checkpointing) can't be scored"
                )

    def _after_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        self.calls[name] += 1
        if not output.requires_grad:
            # With all weights frozen nothing needs gradients until the first scored layer: the graph starts here. The
            # copy is no leaf, so that an activation may work on it in place.
            output = output.detach().requires_grad_().clone()
        inputs = args[0].detach()
        if inputs.shape[0] % self.num_samples:
            raise UserError(
                f"{name}: its input has shape {tuple(inputs.shape)}, whose first axis is no multiple of the "
                f"{self.num_samples} samples of the batch; samples must lie along the outermost axis"
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
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train(train_mode)
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)


def _total_loss(loss_fn: LossFunction, outputs: Any, targets: Any, num_samples: int) -> Tensor:
    """Sum over the batch of each sample's own loss, whatever reduction ``loss_fn`` uses."""
    losses = loss_fn(outputs, targets)
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
    return torch.stack([loss_fn(_take(outputs, row), _take(targets, row)) for row in rows]).sum()


def _micro_batches(inputs: Any, targets: Any, size: int | None) -> Iterator[tuple[Any, Any]]:
    num_samples = _batch_size(inputs)
    step = size or max(num_samples, 1)
    for start in range(0, num_samples, step):
        rows = slice(start, start + step)
        yield _take(inputs, rows), _take(targets, rows)


def _map(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map(item, function) for item in tree)
    if isinstance(tree, dict):
        return {key: _map(item, function) for key, item in tree.items()}
    return tree


def _take(tree: Any, rows: slice) -> Any:
    return _map(tree, lambda tensor: tensor[rows])


def _batch_size(tree: Any) -> int:
    """Length of the first tensor of nested inputs."""
    while not isinstance(tree, Tensor):
        tree = next(iter(tree.values() if isinstance(tree, dict) else tree))
    return len(tree)


def _check_options(criterion: str, micro_batch: int | None) -> None:
    if criterion not in CRITERIA:
        raise UserError(f"criterion={criterion!r}: choose one of {', '.join(CRITERIA)}")
    if micro_batch is not None and micro_batch < 1:
        raise UserError(f"micro_batch={micro_batch}: has to be at least 1")
    if micro_batch is not None and criterion == "batch":
        raise UserError('micro_batch would change the batches that criterion="batch" is defined on; leave it out')


def _log_skipped(inventory: Inventory) -> None:
    if inventory.skipped:
        listed = ", ".join(f"{name} ({reason})" for name, reason in inventory.skipped.items())
        logger.info("not scored: %s", listed)
