"""Which weights of a model can be scored and tuned, under their logical names.

timm fuses the query, key and value projections into one ``nn.Linear``; SPT decides for each of them. A
``LogicalParameter`` is a run of rows of one module's parameter under a name of its own: ``blocks.3.attn.q.weight``
is rows ``0 .. D`` of ``blocks.3.attn.qkv.weight``. Everything else keeps the module's own parameter name.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from spt_dist.errors import UserError


@dataclass(frozen=True)
class LogicalParameter:
    """Rows ``start .. start + shape[0]`` of one parameter of one module."""

    name: str
    module: str
    parameter: str
    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def rows(self) -> slice:
        """The rows of the module's parameter that this is."""
        return slice(self.start, self.start + self.shape[0])

    @property
    def is_matrix(self) -> bool:
        """Whether it can take a structured module (LoRA): a weight of two axes ``(out_features, in_features)``."""
        return len(self.shape) == 2


@dataclass(frozen=True)
class Inventory:
    """What SPT can do with a model.

    Attributes:
        parameters: everything that is scored and may be chosen, in the model's own order.
        skipped: the other parameters, ``name -> reason``.
        head: parameters of the classification head: always trained, never counted.
        always_tuned: backbone parameters that SPT always trains and counts (``cls_token``).
        backbone_size: number of weights outside the head.
    """

    parameters: list[LogicalParameter]
    skipped: dict[str, str]
    head: list[str]
    always_tuned: list[str]
    backbone_size: int

    def by_name(self) -> dict[str, LogicalParameter]:
        """Logical name -> logical parameter."""
        return {parameter.name: parameter for parameter in self.parameters}


def take_inventory(model: nn.Module) -> Inventory:
    """List the logical parameters of ``model``.

    ``nn.Linear`` and ``nn.LayerNorm`` outside the head are eligible (exact types and timm's equal-valued
    LayerNorm; other subclasses may compute something else and are listed under ``skipped``).

    Raises:
        UserError: the model applies weights functionally (``nn.MultiheadAttention``), which hooks cannot see;
            shares one parameter between modules; has batch norm; or is tuned already.
    """
    _refuse_unsupported(model)
    heads = find_heads(model)
    head: list[str] = []
    always_tuned: list[str] = []
    skipped: dict[str, str] = {}
    parameters: list[LogicalParameter] = []
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}".lstrip(".")
            if in_modules(module_name, heads):
                head.append(name)
            elif parameter_name == "cls_token":
                always_tuned.append(name)
            elif own_name_of(module_name) == "qkv" and hasattr(model.get_submodule(parent_of(module_name)), "q_bias"):
                # timm's BEiT and EVA read the weight and leave the module uncalled.
                skipped[name] = "its weight is used without calling the layer"
            elif is_linear(module) or is_layer_norm(module):
                parameters += _split(module_name, module, parameter_name, tuple(parameter.shape))
            else:
                skipped[name] = f"no rule for {type(module).__name__}"
    in_head = set(head)
    size = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in in_head)
    return Inventory(parameters, skipped, head, always_tuned, size)


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes exactly ``x W^T + b``."""
    return type(module) is nn.Linear


def is_layer_norm(module: nn.Module) -> bool:
    """Whether the module is a layer norm over the last axis: ``nn.LayerNorm`` or timm's class of the same values."""
    from timm.layers import LayerNorm as TimmLayerNorm

    if type(module) not in (nn.LayerNorm, TimmLayerNorm):
        return False
    assert isinstance(module, nn.LayerNorm)
    return len(module.normalized_shape) == 1


def find_heads(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that classify; none for a model that has none.

    timm models tell them through ``get_classifier()``; distilled ones have two.
    """
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return ()
    found = get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    return tuple(name for name, module in model.named_modules() if any(module is head for head in heads))


def in_modules(name: str, modules: Iterable[str]) -> bool:
    """Whether ``name`` is one of the modules or lies within one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def parent_of(name: str) -> str:
    """Name of the module that holds the module or parameter ``name``."""
    return name.rpartition(".")[0]


def own_name_of(name: str) -> str:
    """Last part of a dotted name."""
    return name.rpartition(".")[2]


def _split(
    module_name: str, module: nn.Module, parameter_name: str, shape: tuple[int, ...]
) -> Iterator[LogicalParameter]:
    parent = parent_of(module_name)
    if own_name_of(module_name) == "qkv" and is_linear(module) and shape[0] % 3 == 0:
        out_features = shape[0] // 3
        for part, letter in enumerate("qkv"):
            name = ".".join(filter(None, (parent, letter, parameter_name)))
            yield LogicalParameter(name, module_name, parameter_name, part * out_features, (out_features, *shape[1:]))
    else:
        name = f"{module_name}.{parameter_name}".lstrip(".")
        yield LogicalParameter(name, module_name, parameter_name, 0, shape)


def _refuse_unsupported(model: nn.Module) -> None:
    if hasattr(model, "spt_plan"):
        raise UserError("this model has tuning modules already; merge it or build the backbone anew")
    owner: dict[int, str] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise UserError(
                f"{module_name}: nn.MultiheadAttention applies its weights functionally, so neither scores nor "
                "tuning modules can reach them; use a backbone with Linear projections (timm's ViT)"
            )
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise UserError(
                f"{module_name}: {type(module).__name__} keeps running statistics, which change in training and which "
                "task files don't hold; use a backbone without batch norm"
            )
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}".lstrip(".")
            first = owner.setdefault(id(parameter), name)
            if first != name:
                raise UserError(f"{name}: shares its values with {first}; tied parameters are not supported")
