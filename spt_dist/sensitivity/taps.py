"""Hooks on layers: each layer's input and output gradient, handed on while the backward pass goes by."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spt_dist.errors import UserError
from spt_dist.models.layers import layer_kind

OnGradient = Callable[[str, Tensor, Tensor], None]
OnCall = Callable[[str, Tensor], None]


class LayerTaps:
    """Taps on the outputs of some layers.

    ``on_call(name, inputs)`` is called in the forward pass with each layer's input, and in the backward pass
    ``on_gradient(name, inputs, grads)`` with its input and the gradient of its output. The input is kept as autograd
    keeps what it needs: modified in place it is an error, and under gradient checkpointing it is computed anew.

    Attributes:
        sees_half: whether any layer so far has returned float16.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], on_call: OnCall, on_gradient: OnGradient, per_sample: bool
    ) -> None:
        self.sees_half = False
        self._layers = {name: model.get_submodule(name) for name in names}
        self._on_call = on_call
        self._on_gradient = on_gradient
        self._per_sample = per_sample
        self._num_samples = 0
        self._calls: Counter[str] = Counter()
        self._with_graph: set[str] = set()
        self._rows_of_one_sample: dict[str, int] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on every layer for the length of the block."""
        handles = [
            layer.register_forward_hook(partial(self._after_forward, name), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, num_samples: int) -> None:
        """Begin a forward pass over ``num_samples`` samples."""
        self._num_samples = num_samples
        self._calls.clear()
        self._with_graph.clear()

    def check_all_called(self) -> None:
        """Every layer must have run once: otherwise its scores would be silently wrong.

        Raises:
            UserError: names the layer.
        """
        for name in self._layers:
            if self._calls[name] == 0:
                raise UserError(
                    f"{name}: never called in the forward pass; it is unused (take it out of the model), or its weight "
                    "is used functionally, where no score can be found"
                )
            if self._calls[name] > 1:
                raise UserError(
                    f"{name}: called {self._calls[name]} times in one forward pass; a layer that is used in several "
                    "places can't be scored"
                )

    def check_all_have_graph(self) -> None:
        """After the backward pass: layers that ran with gradients off, and never again with them on, have no scores.

        Raises:
            UserError: names the layer.
        """
        for name in self._layers:
            if name not in self._with_graph:
                raise UserError(
                    f"{name}: ran with gradients switched off only (torch.no_grad, or a reentrant checkpoint around "
                    "the first layers), so it can't be scored; use checkpoints with use_reentrant=False"
                )

    def _after_forward(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        self._calls[name] += 1
        # The first time through a reentrant checkpoint; the second has a graph.
        if not torch.is_grad_enabled():
            return output
        self._with_graph.add(name)
        self.sees_half |= output.dtype is torch.float16
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        self._on_call(name, given)
        inputs = given.detach()
        self._check_rows(name, inputs)
        if torch.is_autocast_enabled(output.device.type) and layer_kind(layer) in ("linear", "conv2d"):
            # What the layer has really multiplied by its weight.
            inputs = inputs.to(output.dtype)
        if not output.requires_grad:
            # With all weights frozen nothing needs gradients until the first scored layer: the graph starts here. The
            # copy is no leaf, so that an activation may work on it in place.
            output = output.detach().requires_grad_().clone()
        tapped: Tensor = _Tap.apply(output, inputs, partial(self._on_gradient, name))
        return tapped

    def _check_rows(self, name: str, inputs: Tensor) -> None:
        """Refuse layers that don't work sample by sample, whose scores would be silently wrong."""
        if not self._per_sample:
            return
        if self._num_samples == 1:
            self._rows_of_one_sample[name] = len(inputs)
        rows = self._rows_of_one_sample[name]
        if len(inputs) != self._num_samples * rows:
            raise UserError(
                f"{name}: its input has shape {tuple(inputs.shape)} for {self._num_samples} samples and "
                f"{rows} rows for one; samples must lie along the outermost axis. "
                "With micro_batch=1 (in a config: sensitivity.batch_size=1) any layout will do"
            )


class _Tap(torch.autograd.Function):
    """The identity, which shows the gradient that passes it together with a tensor kept from the forward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, show: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.show = show
        # Neither a copy nor a view of the output: on views that a Function returns nothing may work in place, and no
        # layer that is tapped needs its own output for its backward pass.
        return output.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.show(inputs, grads)
        return grads, None, None
