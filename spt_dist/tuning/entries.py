"""Chosen entries of any parameter of any module: a whole bias, some weights of a convolution, part of a token."""

from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.models.sharded import is_part


class EntryDelta(nn.Module):
    """Trainable additions to chosen entries of a tensor, zero at first."""

    positions: Tensor

    def __init__(self, positions: Tensor, device: torch.device | None = None) -> None:
        """``positions``: int64 flat row-major positions in the tensor, ascending, at least one."""
        super().__init__()
        # The plan says where the values belong, so the positions are not part of the state.
        self.register_buffer("positions", positions.to(device), persistent=False)
        self.values = nn.Parameter(torch.zeros(len(positions), device=device))

    def forward(self, tensor: Tensor, sign: int = 1) -> Tensor:
        """The tensor with the values, times ``sign``, added; same shape and dtype."""
        values = self.values.to(tensor.dtype)
        if len(values) == tensor.numel():
            return tensor.add(values.view(tensor.shape), alpha=sign)
        return tensor.flatten().index_add(0, self.positions, values, alpha=sign).view(tensor.shape)


class EntryTuned(nn.Module):
    """Mixed into the class of a module that reads some of its parameters with an ``EntryDelta`` added.

    Attributes:
        plain_class: the class without this.
        tuned_names: the parameters in question.
    """

    plain_class: type[nn.Module]
    tuned_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle can't find a class that was made at run time.
        return _new_module, (self.plain_class, self.tuned_names), self.__dict__


def holder_name(name: str) -> str:
    """Name of the submodule that holds what is added to the parameter ``name``."""
    return f"{name}_delta"


def tune_entries(module: nn.Module, name: str, delta: EntryDelta) -> None:
    """Let ``module.<name>`` be the parameter of that name with ``delta`` added, whoever reads it.

    The module's class becomes a subclass that computes this attribute. The parameter itself stays where it is, under
    its name in ``named_parameters`` and in the state dict; ``delta`` becomes the submodule ``<name>_delta``.
    """
    plain, names = (module.plain_class, module.tuned_names) if isinstance(module, EntryTuned) else (type(module), ())
    module.add_module(holder_name(name), delta)
    module.__class__ = _tuned_class(plain, (*names, name))


@torch.no_grad()
def merge_entries(module: nn.Module, sign: int = 1) -> None:
    """Undo ``tune_entries``, with the values added to the parameters: sums in float64, then rounded to their dtype.

    Args:
        sign: -1 takes the values away instead.
    """
    assert isinstance(module, EntryTuned)
    for name in module.tuned_names:
        parameter, delta = module._parameters[name], module._modules.pop(holder_name(name))
        assert parameter is not None and delta is not None
        parameter.copy_(delta(parameter.double(), sign))
    module.__class__ = module.plain_class  # type: ignore[assignment]


def _tuned_class(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members = {name: _reader(name) for name in names}
    # Under its old name, so that messages and files speak of the architecture.
    return type(plain.__name__, (EntryTuned, plain), {**members, "plain_class": plain, "tuned_names": names})


def _reader(name: str) -> property:
    # An AttributeError in here would let nn.Module hand out the bare parameter without a word.
    def read(module: nn.Module) -> Tensor:
        parameter, delta = module._parameters[name], module._modules[holder_name(name)]
        assert parameter is not None and delta is not None
        # Engines that spread parameters look at them between the layer's runs.
        whole: Tensor = parameter if is_part(parameter) else delta(parameter)
        return whole

    return property(read)


def _new_module(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    tuned = _tuned_class(plain, names)
    return tuned.__new__(tuned)
