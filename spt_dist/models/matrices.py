"""Which weights of a model can be scored and tuned, under their logical names.

timm fuses the query, key and value projections into one ``nn.Linear``; SPT decides for each of them. A
``LogicalParameter`` is a run of rows of one module's parameter under a name of its own: ``blocks.3.attn.q.weight``
is rows ``0 .. D`` of ``blocks.3.attn.qkv.weight``. Everything else keeps the module's own parameter name.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from spt_dist.errors import UserError
from spt_dist.models.layers import is_linear, matrix_kind
from spt_dist.models.projections import is_passed_by
from spt_dist.models.sharded import whole_shape
from spt_dist.tables import format_table

# What mmseg's segmentation models have beside their backbone.
SEGMENTATION_HEADS = ("neck", "decode_head", "auxiliary_head")
# Kinds of logical parameters, and what tables call them: first those that are matrices, then the others.
_MATRIX_KINDS = {
    "linear": "matrices: Linear",
    "part": "matrices: parts of a fused Linear",
    "depthwise": "matrices: depthwise convolutions",
    "pointwise": "matrices: pointwise convolutions",
}
_OTHER_KINDS = {"convolution": "dense convolutions", "vector": "vectors", "other": "tokens and tables"}
KINDS = _MATRIX_KINDS | _OTHER_KINDS


@dataclass(frozen=True)
class LogicalParameter:
    """Rows ``start .. start + shape[0]`` of one parameter of one module.

    Attributes:
        name: the logical name.
        module, parameter: where it is: the module's name in the model, and the parameter's own name in it.
        start: the first row.
        shape: of these rows.
        kind: "linear", "part" (of a fused Linear layer), "depthwise" and "pointwise" (convolutions), which are
            matrices; "convolution" (any other), "vector" or "other".
    """

    name: str
    module: str
    parameter: str
    start: int
    shape: tuple[int, ...]
    kind: str

    @property
    def is_matrix(self) -> bool:
        """Whether it can take a structured module (LoRA)."""
        return self.kind in _MATRIX_KINDS

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of a matrix: a convolution's kernel is flattened."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def rows(self) -> slice:
        """The rows of the module's parameter that this is."""
        return slice(self.start, self.start + self.shape[0])


@dataclass(frozen=True)
class Inventory:
    """What SPT can do with a model.

    Attributes:
        parameters: everything outside the head that can be scored, in the model's own order.
        skipped: the other parameters outside the head, ``name -> reason``.
        head: parameters of the classification head: always trained, never counted.
        always_tuned: those of ``parameters`` that SPT always trains and counts, whatever their scores (``cls_token``).
        backbone_size: number of weights outside the head.
        shapes: of all the model's own parameters, the head's too, by their names in it.
    """

    parameters: list[LogicalParameter]
    skipped: dict[str, str]
    head: list[str]
    always_tuned: list[str]
    backbone_size: int
    shapes: dict[str, tuple[int, ...]]

    def by_name(self) -> dict[str, LogicalParameter]:
        """Logical name -> logical parameter."""
        return {parameter.name: parameter for parameter in self.parameters}

    def summary(self, skipped: Mapping[str, str] | None = None) -> str:
        """A table of what becomes of all parameters: their kinds, and in each the operations, over all blocks.

        Args:
            skipped: parameters without scores, ``name -> reason``, as a scoring pass has found them; ``None`` for
                those that are known beforehand.
        """
        skipped = self.skipped if skipped is None else skipped
        groups: dict[str, dict[str, list[int]]] = {label: defaultdict(list) for label in KINDS.values()}
        groups["always tuned, whatever the scores"] = defaultdict(list)
        for item in self.parameters:
            if item.name not in skipped:
                always = item.name in self.always_tuned
                label = "always tuned, whatever the scores" if always else KINDS[item.kind]
                groups[label][operation_of(item.name)].append(item.numel)
        known = {name: prod(shape) for name, shape in self.shapes.items()}
        known |= {item.name: item.numel for item in self.parameters}
        for name, reason in skipped.items():
            groups.setdefault(f"left out: {reason}", defaultdict(list))[operation_of(name)].append(known[name])
        left_out = sum(known[name] for name in skipped)
        groups["head: always trained, never counted"] = defaultdict(list)
        for name in self.head:
            groups["head: always trained, never counted"][operation_of(name)].append(known[name])
        title = f"inventory: {self.backbone_size:,} weights outside the head, {left_out:,} of them left out"
        return format_table(title, ["", "tensors", "weights"], list(_rows(groups)))


def take_inventory(model: nn.Module) -> Inventory:
    """List the logical parameters of ``model``.

    Parameters of layers of a known kind (see ``models.layers``) are scored from the layer's inputs and outputs, all
    others from the operations that use them (``cls_token``, ``pos_embed``, layer scales, relative position tables).

    Raises:
        UserError: the model applies weights functionally (``nn.MultiheadAttention``), which hooks cannot see;
            shares one parameter between modules; has batch norm outside its head; or is tuned already.
    """
    heads = find_heads(model)
    _refuse_unsupported(model, heads)
    head: list[str] = []
    always_tuned: list[str] = []
    skipped: dict[str, str] = {}
    parameters: list[LogicalParameter] = []
    shapes: dict[str, tuple[int, ...]] = {}
    size = 0
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}".lstrip(".")
            shapes[name] = whole_shape(parameter)
            if in_modules(module_name, heads):
                head.append(name)
                continue
            size += prod(shapes[name])
            if parameter_name == "cls_token":
                always_tuned.append(name)
            if is_linear(module) and _used_by_parent(model, module_name):
                skipped[name] = "its weight is used without calling the layer"
            else:
                parameters += _split(module_name, module, parameter_name, shapes[name])
    return Inventory(parameters, skipped, head, always_tuned, size, shapes)


def find_heads(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that classify; none for a model that has none.

    timm models tell them through ``get_classifier()``; distilled ones have two. In a segmentation model of mmseg it is
    all that is not the backbone.
    """
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return tuple(name for name in SEGMENTATION_HEADS if hasattr(model, "backbone") and hasattr(model, name))
    found = get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    return tuple(name for name, module in model.named_modules() if any(module is head for head in heads))


def head_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a head learns beside its parameters: the running means of batch norm, name -> buffer."""
    heads = find_heads(model)
    return {
        f"{module_name}.{name}": buffer
        for module_name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and in_modules(module_name, heads)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


def in_modules(name: str, modules: Iterable[str]) -> bool:
    """Whether ``name`` is one of the modules or lies within one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def parent_of(name: str) -> str:
    """Name of the module that holds the module or parameter ``name``."""
    return name.rpartition(".")[0]


def own_name_of(name: str) -> str:
    """Last part of a dotted name."""
    return name.rpartition(".")[2]


def _used_by_parent(model: nn.Module, module_name: str) -> bool:
    return own_name_of(module_name) == "qkv" and is_passed_by(model.get_submodule(parent_of(module_name)))


def _split(
    module_name: str, module: nn.Module, parameter_name: str, shape: tuple[int, ...]
) -> Iterator[LogicalParameter]:
    kind = _kind_of(module, parameter_name, shape)
    if own_name_of(module_name) == "qkv" and is_linear(module) and shape[0] % 3 == 0:
        rows = shape[0] // 3
        for part, letter in enumerate("qkv"):
            name = logical_name(parent_of(module_name), letter, parameter_name)
            part_kind = "part" if kind == "linear" else kind
            yield LogicalParameter(name, module_name, parameter_name, part * rows, (rows, *shape[1:]), part_kind)
    else:
        name = logical_name(module_name, parameter_name)
        yield LogicalParameter(name, module_name, parameter_name, 0, shape, kind)


def _kind_of(module: nn.Module, parameter_name: str, shape: tuple[int, ...]) -> str:
    """One of ``KINDS``."""
    matrix = matrix_kind(module) if parameter_name == "weight" else None
    if matrix is not None:
        return matrix
    if len(shape) == 1:
        return "vector"
    return "convolution" if isinstance(module, _ConvNd) and parameter_name == "weight" else "other"


def _rows(groups: Mapping[str, Mapping[str, list[int]]]) -> Iterator[list[str]]:
    """A row for each group that has anything, and below it one for each of its operations."""
    for label, operations in groups.items():
        sizes = [size for found in operations.values() for size in found]
        if sizes:
            yield [label, f"{len(sizes):,}", f"{sum(sizes):,}"]
            for operation, found in operations.items():
                yield [f"  {operation}", f"{len(found):,}", f"{sum(found):,}"]


def operation_of(name: str) -> str:
    """The name with block numbers left out: ``blocks.3.attn.q.weight`` -> ``blocks.attn.q.weight``."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def logical_name(*parts: str) -> str:
    """Dotted name of the parts, without what torch's activation checkpointing and compilation put between."""
    name = ".".join(filter(None, parts))
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _refuse_unsupported(model: nn.Module, heads: tuple[str, ...]) -> None:
    if hasattr(model, "spt_plan"):
        raise UserError("this model has tuning modules already; merge it or build the backbone anew")
    owner: dict[int, str] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise UserError(
                f"{module_name}: nn.MultiheadAttention applies its weights functionally, so neither scores nor "
                "tuning modules can reach them; use a backbone with Linear projections (timm's ViT; in mmseg "
                "type='TimmVisionTransformer')"
            )
        if isinstance(module, _BatchNorm) and module.track_running_stats and not in_modules(module_name, heads):
            raise UserError(
                f"{module_name}: {type(module).__name__} keeps running statistics, which change in training and which "
                "task files hold of a head only; use a backbone without batch norm"
            )
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}".lstrip(".")
            first = owner.setdefault(id(parameter), name)
            if first != name:
                raise UserError(f"{name}: shares its values with {first}; tied parameters are not supported")
