"""Forward and backward passes over some samples that add to the scores."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby, takewhile
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from spt_dist.errors import UserError
from spt_dist.models.matrices import Inventory, LogicalParameter
from spt_dist.models.projections import projections_called
from spt_dist.models.sharded import is_sharded, whole_shape
from spt_dist.sensitivity.agreement import exchange
from spt_dist.sensitivity.buffers import Buffer, Unit, make_buffer
from spt_dist.sensitivity.direct import DirectUses
from spt_dist.sensitivity.loss_scale import find_loss_scale
from spt_dist.sensitivity.losses import LossFunction, mean_loss, summed_loss
from spt_dist.sensitivity.nested import batch_size
from spt_dist.sensitivity.rules import find_rule
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, all_max
from spt_dist.sensitivity.taps import LayerTaps

_MISSED = "a gradient reaches it on a way that can't be followed"
# What a pass does with the scores of one layer or one directly used parameter: (name, parameter -> its scores).
Sink = Callable[[str, dict[str, Tensor]], None]


@dataclass(frozen=True)
class PassOptions:
    """How the samples go through the model.

    Attributes:
        per_sample: square each sample's gradient; otherwise that of the mean over the samples of a pass.
        dtype: autocast to it; ``None`` for none.
        lockstep: all ranks make the same number of passes.
        shard_sums: keep the sums in parts over the ranks, or whole on each; ``None`` for what ``make_buffer`` picks.
    """

    per_sample: bool
    dtype: torch.dtype | None
    lockstep: bool
    shard_sums: bool | None


class ScoringPass:
    """A model with taps on its layers and its other parameters followed, and the buffer for their scores.

    The first forward pass settles which of the directly used parameters can be scored, so the buffer is made then.
    """

    def __init__(
        self, model: nn.Module, inventory: Inventory, loss_fn: LossFunction, options: PassOptions, device: torch.device
    ) -> None:
        self.model = model
        self.parameters = inventory.parameters
        self.skipped = inventory.skipped
        self.failed = False
        self.loss_scale = 1.0
        self._loss_fn = loss_fn
        self._options = options
        self._device = device
        self._buffer: Buffer | None = None
        self._sink: Sink | None = None
        self._num_groups = 0
        self._has_scale = False
        self._confirmed = False
        self._worst = torch.zeros((), device=device)
        tapped = [item for item in inventory.parameters if _has_rule(model, item)]
        self._layers = {item.module: model.get_submodule(item.module) for item in tapped}
        # Of the layers' own parameters, of which the logical ones are rows.
        self._shapes = {
            module: {item.parameter: whole_shape(self._layers[module].get_parameter(item.parameter)) for item in items}
            for module, items in groupby(tapped, key=attrgetter("module"))
        }
        self._tapped = set(tapped)
        direct = {item.name: (item.module, item.parameter) for item in inventory.parameters if item not in self._tapped}
        # Tokens and position embeddings come before all layers, and a sharded buffer is filled from its end.
        first = [item.name for item in takewhile(lambda item: item not in self._tapped, inventory.parameters)]
        self._direct = DirectUses(model, self._layers, direct, first, self._on_direct_scores)
        self._taps = LayerTaps(
            model, self._layers, self._direct.pass_layer, self._on_gradient, per_sample=options.per_sample
        )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the model for the length of the block."""
        with projections_called(self.model), self._taps.attached(), self._direct.attached():
            yield

    def add(self, inputs: Any, targets: Any, counts: bool = True) -> None:
        """Add the scores of some samples; sets ``failed`` if one is NaN or infinite. The first call is collective.

        Args:
            inputs: what the model takes, samples along axis 0.
            targets: what the loss function takes.
            counts: whether they count; if not, their scores are zeros.
        """
        confirmed = False
        while not confirmed:
            loss = self._forward(inputs, targets)
            if self._taps.sees_half and not self._has_scale:
                self._has_scale = True
                self.loss_scale = find_loss_scale(lambda scale: self._is_finite(inputs, targets, scale))
                continue
            buffer = self._settle(has_samples=True)
            self._worst.zero_()
            missed = self._backward(loss if counts else loss * 0)
            buffer.end_batch()
            confirmed = self._confirm(missed)
        self.failed = not bool((loss.detach() + self._worst).isfinite())

    def join(self) -> None:
        """Take part in what the other ranks agree on in their first ``add``, without samples of one's own. Collective.

        Raises:
            UserError: no rank has samples.
        """
        confirmed = self._confirmed
        while not confirmed:
            self._settle(has_samples=False)
            confirmed = self._confirm(set())

    def observe(self, inputs: Any, targets: Any, sink: Sink) -> Tensor:
        """Forward and backward as for ``add``, with the scores handed to ``sink``; returns the loss."""
        loss = self._forward(inputs, targets)
        self._sink = sink
        self._backward(loss)
        self._sink = None
        return loss.detach()

    def find_skipped(self, inputs: Any, targets: Any) -> dict[str, str]:
        """Forward and backward without scores, which need be no values at all: what can't be scored, name -> reason."""
        loss = self._forward(inputs, targets)
        self._sink = lambda name, scores: None
        missed = self._backward(loss)
        self._sink = None
        return self.skipped | self._direct.unsupported | dict.fromkeys(missed, _MISSED)

    def _settle(self, has_samples: bool) -> Buffer:
        """Agree with the other ranks, once, on what is scored, and make room for it. Collective the first time."""
        if self._buffer is not None:
            return self._buffer
        mine = (self._direct.unsupported, self.loss_scale) if has_samples else None
        found = [one for one in exchange(mine) if one is not None]
        if not found:
            raise UserError("batches is empty: the sensitivity needs at least one sample")
        self.loss_scale = min(scale for _, scale in found)
        for unsupported, _ in found:
            self._direct.unsupported.update(unsupported)
        self.skipped = self.skipped | self._direct.unsupported
        self.parameters = [item for item in self.parameters if item.name not in self._direct.unsupported]
        if not self.parameters:
            raise UserError(f"{type(self.model).__name__} has no weight outside its head that can be scored")
        index = FlatIndex(tuple(item.name for item in self.parameters), tuple(item.shape for item in self.parameters))
        sharded = is_sharded(self.model) if self._options.shard_sums is None else self._options.shard_sums
        self._buffer = make_buffer(index, self._units(index), self._device, sharded)
        return self._buffer

    def _confirm(self, missed: set[str]) -> bool:
        """Agree, once, that gradients have reached parameters only where they are followed. Collective until then.

        Returns:
            Whether that is so; if not, the pass has to be made again, without the parameters concerned.
        """
        if self._confirmed:
            if missed:
                raise UserError(f"{min(missed)}: a gradient reaches it on a way that the first pass did not have")
            return True
        everywhere = set().union(*exchange(missed))
        for name in everywhere:
            self._direct.unsupported[name] = _MISSED
        self._confirmed = not everywhere
        if everywhere:
            self._buffer = None
        return self._confirmed

    def finish(self) -> ScoreShard:
        """This rank's part of the scores. Collective."""
        assert self._buffer is not None
        return self._buffer.finish(self.loss_scale**-2)

    def _units(self, index: FlatIndex) -> Mapping[str, Unit]:
        """Where the parameters of each layer, and each directly used parameter, lie in the flat index space."""
        units: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
        for start, item in zip(index.offsets, self.parameters, strict=False):
            if item not in self._tapped:
                units[item.name] = {item.parameter: (start, item.shape)}
            elif item.start == 0:
                # The q, k and v rows of a fused projection follow one another, so one run spans the parameter.
                shape = self._shapes[item.module][item.parameter]
                units.setdefault(item.module, {})[item.parameter] = (start, shape)
        return units

    def _forward(self, inputs: Any, targets: Any) -> Tensor:
        """The loss whose gradients are squared."""
        num_samples = batch_size(inputs)
        self._num_groups = num_samples if self._options.per_sample else 1
        self._taps.start(num_samples)
        dtype = self._options.dtype
        with torch.autocast(self._device.type, dtype) if dtype is not None else nullcontext():
            with self._direct.forward_pass(self._num_groups):
                outputs = self.model(inputs)
            self._taps.check_all_called()
            self._direct.check_layer_weights()
            loss = summed_loss if self._options.per_sample else mean_loss
            return loss(self._loss_fn, outputs, targets, num_samples)

    def _backward(self, loss: Tensor) -> set[str]:
        """Returns the parameters that a gradient has reached where they are not followed."""
        try:
            (loss * self.loss_scale).backward()
        except CheckpointError as error:
            raise UserError(
                f"{type(self.model).__name__} has a gradient checkpoint around a part of a module that uses the "
                "module's own parameters, which can't be followed there; switch gradient checkpointing off, and keep "
                "memory down by micro_batch or memory_limit"
            ) from error
        self._taps.check_all_have_graph()
        return self._direct.end_backward()

    def _is_finite(self, inputs: Any, targets: Any, scale: float) -> bool:
        """Whether all gradients are, with a loss scale, on all ranks that run in step with this one."""
        self.loss_scale = scale
        finite: list[Tensor] = []
        self.observe(inputs, targets, lambda _, sums: finite.extend(s.isfinite().all() for s in sums.values()))
        own = bool(torch.stack(finite).all())
        return all_max(int(not own)) == 0 if self._options.lockstep else own

    @torch.no_grad()
    def _on_gradient(self, name: str, inputs: Tensor, grads: Tensor) -> None:
        rule = find_rule(self._layers[name])
        assert rule is not None
        if self._sink is not None:
            sums = {key: torch.zeros(shape, device=self._device) for key, shape in self._shapes[name].items()}
            rule(self._layers[name], inputs, grads, self._num_groups, sums)
            self._sink(name, sums)
            return
        assert self._buffer is not None
        with self._buffer.sums(name) as sums:
            rule(self._layers[name], inputs, grads, self._num_groups, sums)
            self._note_worst(sums)

    @torch.no_grad()
    def _on_direct_scores(self, name: str, scores: Tensor) -> None:
        if self._sink is not None:
            self._sink(name, {name: scores})
            return
        assert self._buffer is not None
        with self._buffer.sums(name) as sums:
            (total,) = sums.values()
            total += scores
            self._note_worst(sums)

    def _note_worst(self, sums: dict[str, Tensor]) -> None:
        for scores in sums.values():
            torch.maximum(self._worst, scores.amax(), out=self._worst)


def _has_rule(model: nn.Module, item: LogicalParameter) -> bool:
    """Whether a layer's rule scores the parameter; layers may have others (``weight_v`` of a weight norm)."""
    return item.parameter in ("weight", "bias") and find_rule(model.get_submodule(item.module)) is not None
