"""Passes of a model that takes no memory, for what they would take.

Shape suffixes: B samples, C channels, H height, W width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spt_dist.allocation.plan import Plan
from spt_dist.evaluation.ledger import Ledger
from spt_dist.models.losses import sample_losses, targets_shape
from spt_dist.models.matrices import take_inventory
from spt_dist.sensitivity.modes import scoring_mode
from spt_dist.sensitivity.scoring import PassOptions, ScoringPass
from spt_dist.tuning.inject import install, make_modules, trainable_parameters


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a forward and backward pass, without weights, buffers and images.

    Attributes:
        num_samples: in the pass.
        kept: alive between forward and backward: what autograd keeps.
        peak: the most alive at a time: what is kept, gradients of weights, temporary tensors.
        gradients: gradients of weights among ``peak``.
    """

    num_samples: int
    kept: int
    peak: int
    gradients: int

    @property
    def activations(self) -> int:
        """``peak`` without gradients of weights."""
        return self.peak - self.gradients


class Rehearsal:
    """A model of which nothing is left but shapes and dtypes."""

    def __init__(self, model: nn.Module, plan: Plan | None = None) -> None:
        """Take over a model on torch's meta device, which is changed in place.

        Args:
            model: in training mode or not, as it shall run.
            plan: is injected, as for training.

        Raises:
            UserError: as ``inject``.
        """
        self.model = model
        if plan is not None:
            # Which columns single weights touch depends on values, so modules are made on the CPU, on weights that are
            # one number each in place of all of theirs.
            _replace_tensors(model, lambda tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
            install(model, plan, make_modules(model, plan), backbone_fingerprint="")
        self._mode = FakeTensorMode()
        with self._mode:
            _replace_tensors(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))

    def train(
        self,
        shape_CHW: tuple[int, int, int],
        num_samples: int,
        *,
        autocast: torch.dtype | None = None,
        keeps_gradients: bool = True,
        accumulates: bool = False,
    ) -> PassMemory:
        """A pass of training with the model's own loss.

        Args:
            shape_CHW: of an image.
            num_samples: in the pass.
            autocast: dtype of the autocast around the forward pass.
            keeps_gradients: whether gradients stay until the step, or are sent away as they come.
            accumulates: whether the pass finds the gradients of one before it.

        Raises:
            RuntimeError, AssertionError: the model does not take such images.
        """
        trained = [parameter for _, parameter in trainable_parameters(self.model)]
        with self._ledger(shape_CHW, num_samples) as (ledger, images_BCHW, targets):

            def on_gradient(parameter: Tensor) -> None:
                assert isinstance(parameter, nn.Parameter)
                if keeps_gradients:
                    ledger.mark_gradient(parameter)
                else:
                    parameter.grad = None

            handles = [parameter.register_post_accumulate_grad_hook(on_gradient) for parameter in trained]
            for _ in range(2 if accumulates else 1):
                with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
                    outputs = self.model(images_BCHW)
                loss = sample_losses(self.model)(outputs, targets).mean()
                del outputs
                kept = ledger.live - ledger.gradients
                loss.backward()
                del loss
            memory = PassMemory(num_samples, kept, ledger.peak, ledger.gradients_at_peak)
            for parameter, handle in zip(trained, handles, strict=True):
                handle.remove()
                parameter.grad = None
        return memory

    def score(
        self,
        shape_CHW: tuple[int, int, int],
        num_samples: int,
        *,
        per_sample: bool = True,
        train_mode: bool = False,
        autocast: torch.dtype | None = None,
        memory_limit: int | None = None,
    ) -> PassMemory:
        """A pass of stage 1; the scores of the layer that the backward pass has come to are among its ``peak``.

        Passes over a few samples tell how memory grows, since rules of some layers go from sample to sample.

        Args:
            shape_CHW: of an image.
            num_samples: most samples in the pass.
            per_sample, train_mode, autocast, memory_limit: as in ``estimate_sensitivity``.

        Raises:
            UserError: as ``estimate_sensitivity``.
            RuntimeError, AssertionError: the model does not take such images.
        """
        kept = 0

        def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
            nonlocal kept
            kept = ledger.live
            # One value a sample: what to do with a single one would depend on it.
            return sample_losses(self.model)(outputs, targets)

        options = PassOptions(per_sample, autocast, lockstep=False, shard_sums=False)
        passes: list[PassMemory] = []
        with self._mode, scoring_mode(self.model, train_mode):
            scoring = ScoringPass(self.model, take_inventory(self.model), loss_fn, options, torch.device("cpu"))
            with scoring.attached():
                # As in the real run the first sample goes alone, and tells how many rows one has in a layer.
                for size in range(1, 1 + min(num_samples, 3)):
                    with self._ledger(shape_CHW, size) as (ledger, images_BCHW, targets):
                        scoring.observe(images_BCHW, targets, lambda name, scores: None)
                        passes.append(PassMemory(size, kept, ledger.peak, 0))
        if memory_limit is not None:
            num_samples = max(1, min(num_samples, memory_limit // passes[0].kept))
        return _extend(passes, num_samples)

    @contextmanager
    def _ledger(self, shape_CHW: tuple[int, int, int], num_samples: int) -> Iterator[tuple[Ledger, Tensor, Tensor]]:
        """A ledger that knows weights and inputs, and the inputs."""
        with self._mode:
            images_BCHW = torch.empty(num_samples, *shape_CHW)
            targets = torch.empty(targets_shape(self.model, (num_samples, *shape_CHW)), dtype=torch.int64)
            known = [*self.model.parameters(), *self.model.buffers(), images_BCHW, targets]
            with Ledger(known) as ledger:
                yield ledger, images_BCHW, targets


def _replace_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put what ``make`` makes of it in the place of each parameter and buffer."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # register_parameter would read the attribute, which tuned entries compute.
            module._parameters[name] = nn.Parameter(make(parameter), parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = make(buffer)


def _extend(passes: list[PassMemory], num_samples: int) -> PassMemory:
    """What a pass of so many samples takes, from those of 1, 2 and 3."""
    if num_samples <= len(passes):
        return passes[num_samples - 1]
    more = num_samples - len(passes)
    before, last = passes[-2:]
    kept = last.kept + more * (last.kept - before.kept)
    return PassMemory(num_samples, kept, last.peak + more * (last.peak - before.peak), 0)
