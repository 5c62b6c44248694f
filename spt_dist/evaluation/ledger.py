"""How many bytes of tensors are alive while something runs on tensors without memory.

A ``FakeTensorMode`` runs a model on shapes and dtypes alone, backward pass included, and chooses the kernels of the
device that its tensors claim to be on. Every tensor that an operation returns is entered here until it is freed, so
what autograd keeps, gradients and temporary tensors are seen as the real run has them; what a kernel uses inside is
not.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations make inside the block.

    Attributes:
        live: bytes alive now, gradients included.
        gradients: those of them that are gradients of parameters.
        peak: the most bytes that were alive.
        gradients_at_peak: ``gradients`` at that time.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """``known``: tensors that are there anyway and don't count: weights, buffers, inputs."""
        super().__init__()
        self.live = self.gradients = self.peak = self.gradients_at_peak = 0
        # Held on to, so that no address is given out again meanwhile.
        self._known = {_address(tensor): tensor for tensor in known}
        self._sizes: dict[int, int] = {}
        self._of_gradients: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._enter(item)
        return result

    def mark_gradient(self, parameter: nn.Parameter) -> None:
        """Count the parameter's gradient among ``gradients`` from now on."""
        assert parameter.grad is not None
        address = _address(parameter.grad)
        if address in self._sizes and address not in self._of_gradients:
            self._of_gradients.add(address)
            self.gradients += self._sizes[address]

    def _enter(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address in self._known or address in self._sizes:
            return
        storage = tensor.untyped_storage()
        self._sizes[address] = storage.nbytes()
        weakref.finalize(storage, self._drop, address)
        self.live += storage.nbytes()
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients

    def _drop(self, address: int) -> None:
        size = self._sizes.pop(address)
        self.live -= size
        if address in self._of_gradients:
            self._of_gradients.remove(address)
            self.gradients -= size


def _address(tensor: Tensor) -> int:
    # Storages without memory all have the data pointer 0; this is the address of the storage itself.
    return tensor.untyped_storage()._cdata
