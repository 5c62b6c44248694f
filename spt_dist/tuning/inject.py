"""Putting a plan onto a backbone."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn

from spt_dist.allocation.kinds import find_kind
from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.layers import matrix_kind
from spt_dist.models.matrices import LogicalParameter, head_buffers, own_name_of, parent_of, take_inventory
from spt_dist.models.projections import call_projections
from spt_dist.models.sharded import whole_shape, whole_value
from spt_dist.tables import format_table
from spt_dist.tuning.convolutions import TunedConv2d
from spt_dist.tuning.entries import EntryDelta, holder_name, tune_entries
from spt_dist.tuning.layers import TunedLinear
from spt_dist.tuning.prompts import Prompts, check_block
from spt_dist.tuning.registry import make_module
from spt_dist.tuning.structured import ModuleSpec, StructuredModule
from spt_dist.tuning.tuned import TunedLayer

logger = logging.getLogger(__name__)


def inject(model: nn.Module, plan: Plan) -> nn.Module:
    """Freeze ``model`` and make trainable what ``plan`` says, in place.

    The outputs stay what they were, bit for bit, since every update starts at zero; but prompts change them, so do
    modules with ``init="normal"``, and ``call_projections`` changes their rounding where it has anything to switch. The
    model then has ``spt_plan``, the plan; ``spt_fingerprint``, the fingerprint of the untouched backbone; and
    ``spt_originals``, name -> value before training of what is trained in place, outside the head (``cls_token``;
    nothing where the whole backbone is trained).

    Args:
        model: the backbone the plan was made for, with any head.
        plan: from ``allocate`` or a file.

    Returns:
        The same model.

    Raises:
        UserError: the model is tuned already; a name of the plan does not exist in it, has another shape, or can't be
            tuned as the plan says. The model is unchanged then.
    """
    if is_tuned(model):
        raise UserError("inject: this model has been injected already; merge it or build the backbone anew")
    frozen = [name for name in take_inventory(model).head if name not in plan.head]
    if frozen:
        logger.warning(
            "inject: %s stays frozen, since the plan names no such head; a plan made from the scores of a model with a "
            "head trains it",
            frozen[0],
        )
    return install(model, plan, make_modules(model, plan), fingerprint(model))


def make_modules(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The modules that ``plan`` asks for, not yet on the model, which stays as it is.

    Returns:
        The name of a Linear layer, or of a convolution that is a matrix -> the layer to put in its place; the name of a
        block -> its prompts; and the name of any other parameter -> what to add to its entries.

    Raises:
        UserError: as ``inject``.
    """
    placed = _find_places(model, plan)
    _check_own_parameters(model, plan)
    made = {name: _make_prompts(model, name, plan) for name, kind in plan.matrices.items() if _takes_block(kind)}
    for module_name, parameters in placed.items():
        module = model.get_submodule(module_name)
        kind = matrix_kind(module)
        # A convolution's weight that is computed from others (weight norm) is none of its parameters.
        if kind == "linear" or (kind is not None and "weight" in module._parameters):
            made[module_name] = _tune_layer(module, parameters, plan)
        else:
            for parameter in parameters:
                device = module.get_parameter(parameter.parameter).device
                name = ".".join(filter(None, (module_name, parameter.parameter)))
                made[name] = EntryDelta(_positions(parameter, plan), device).train(module.training)
    return made


def trained_tensors(model: nn.Module, plan: Plan, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What is trained once ``modules`` are installed, and the head's buffers, under the names they have then."""
    trained: dict[str, Tensor] = {name: model.get_parameter(name) for name in [*plan.parameters, *plan.head]}
    if plan.head:
        trained |= head_buffers(model)
    for name, module in modules.items():
        prefix = _place_of(name, module)
        for own_name, parameter in module.named_parameters():
            if own_name not in ("weight", "bias"):
                trained[f"{prefix}.{own_name}"] = parameter
    return trained


def install(model: nn.Module, plan: Plan, modules: dict[str, nn.Module], backbone_fingerprint: str) -> nn.Module:
    """Freeze ``model`` but for ``plan`` and the ``modules`` made for it, which take their places; returns ``model``."""
    from spt_dist.tuning.mlp import spare_activations

    in_place = [] if plan.trains_backbone else plan.parameters
    originals = {name: whole_value(model.get_parameter(name)).clone() for name in in_place}
    model.requires_grad_(False)
    place_modules(model, modules)
    spare_activations(model)
    for name in [*plan.parameters, *plan.head]:
        model.get_parameter(name).requires_grad_(True)
    model.spt_plan = plan  # type: ignore[assignment]  # Module declares its attributes as tensors and modules
    model.spt_fingerprint = backbone_fingerprint  # type: ignore[assignment]
    model.spt_originals = originals  # type: ignore[assignment]
    return model


def place_modules(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put what ``make_modules`` made into its places, in place, and see that all of them will be called."""
    call_projections(model)
    for name, module in modules.items():
        if isinstance(module, EntryDelta):
            tune_entries(model.get_submodule(parent_of(name)), own_name_of(name), module)
        elif isinstance(module, Prompts):
            module.attach(model.get_submodule(name))
        else:
            replace_module(model, name, module)


def is_tuned(model: nn.Module) -> bool:
    """Whether a plan has been injected into the model."""
    return isinstance(getattr(model, "spt_plan", None), Plan)


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that is trained, ``(name, parameter)``, the head's included."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters of the model are trained: the plan's table if it has one, head and total."""
    sizes = {name: prod(whole_shape(parameter)) for name, parameter in trainable_parameters(model)}
    plan = getattr(model, "spt_plan", None)
    head = sum(sizes[name] for name in plan.head) if plan is not None else 0
    total = sum(prod(whole_shape(parameter)) for parameter in model.parameters())
    if plan is not None:
        print(plan.summary())
    rows = [
        ["trainable, head not counted", f"{sum(sizes.values()) - head:,}"],
        ["head", f"{head:,}"],
        ["all parameters", f"{total:,}"],
        ["trainable share", f"{sum(sizes.values()) / total:.3%}"],
    ]
    print(format_table("trainable parameters", ["", "number"], rows))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``."""
    setattr(model.get_submodule(parent_of(name)), own_name_of(name), module)


def _takes_block(kind: str) -> bool:
    return find_kind(kind).takes_block


def _make_prompts(model: nn.Module, name: str, plan: Plan) -> nn.Module:
    block = check_block(model, name)
    wanted, weight = plan.shapes[name], block.get_parameter("norm1.weight")
    if wanted != whole_shape(weight):
        raise UserError(f"plan: prompts for {name} have width {wanted}, this model's blocks {whole_shape(weight)}")
    options = plan.modules
    return Prompts(plan.rank, wanted[0], options.init, options.dropout, weight.device).train(block.training)


def _place_of(name: str, module: nn.Module) -> str:
    """Name of the submodule that something from ``make_modules`` becomes."""
    if isinstance(module, EntryDelta):
        return holder_name(name)
    return f"{name}.prompts" if isinstance(module, Prompts) else name


def _find_places(model: nn.Module, plan: Plan) -> dict[str, list[LogicalParameter]]:
    known = take_inventory(model).by_name()
    placed: dict[str, list[LogicalParameter]] = defaultdict(list)
    named = Counter([*plan.matrices, *plan.vectors, *plan.sparse, *plan.parameters])
    matrices = [name for name, kind in plan.matrices.items() if not _takes_block(kind)]
    for name in [*matrices, *plan.vectors, *plan.sparse]:
        if name not in known:
            raise UserError(
                f"plan: {name} is no weight of this {type(model).__name__}; the plan is for another backbone"
            )
        if known[name].shape != plan.shapes[name]:
            raise UserError(f"plan: {name} has shape {plan.shapes[name]}, this model's has {known[name].shape}")
        if named[name] > 1:
            raise UserError(f"plan: {name} is to be tuned in more than one way")
        if name in plan.matrices and not known[name].is_matrix:
            kind = plan.matrices[name]
            raise UserError(
                f"plan: {name} can't have a {kind} module, since it is no weight of a Linear layer "
                "or of a depthwise or pointwise convolution"
            )
        placed[known[name].module].append(known[name])
    return placed


def _check_own_parameters(model: nn.Module, plan: Plan) -> None:
    own = dict(model.named_parameters())
    for name in [*plan.parameters, *plan.head]:
        if name not in own:
            raise UserError(
                f"plan: {name} is no parameter of this {type(model).__name__}; the plan is for another model"
            )
        if name in plan.shapes and plan.shapes[name] != whole_shape(own[name]):
            raise UserError(f"plan: {name} has shape {plan.shapes[name]}, this model's has {whole_shape(own[name])}")


def _tune_layer(layer: nn.Module, parameters: list[LogicalParameter], plan: Plan) -> TunedLayer:
    options = plan.modules
    is_parallel = own_name_of(parameters[0].module) in options.parallel
    if "weight" not in layer._parameters:
        raise UserError(
            f"plan: {parameters[0].name} is computed by a parametrization, so it can't be tuned; remove that first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    device = layer.get_parameter("weight").device
    tuned_class = TunedLinear if isinstance(layer, nn.Linear) else TunedConv2d
    tuned = tuned_class(layer, 0.0 if is_parallel else options.dropout, options.drop_path)
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for parameter in parameters:
        if parameter.name in plan.matrices:
            key = parameter.name.split(".")[-2] if parameter.kind == "part" else "whole"
            tuned.add_structured(key, parameter.rows, _make_structured(parameter, plan, is_parallel, device))
        else:
            (weights if parameter.is_matrix else biases).append(_positions(parameter, plan))
    if weights:
        tuned.tune_weights(torch.cat(weights), device)
    if biases:
        tuned.bias_delta = EntryDelta(torch.cat(biases), device)
    return tuned.train(layer.training)


def _make_structured(matrix: LogicalParameter, plan: Plan, is_parallel: bool, device: torch.device) -> StructuredModule:
    kind, is_depthwise = plan.matrices[matrix.name], matrix.kind == "depthwise"
    out_features, in_features = matrix.matrix_shape
    spec = ModuleSpec(in_features, out_features, plan.rank, plan.modules.init, is_parallel and not is_depthwise, device)
    module = make_module(kind, spec)
    if is_depthwise and not (module.reads_output or module.can_merge()):
        raise UserError(
            f"plan: {matrix.name} can't have a {kind} module: each row of a depthwise convolution reads another "
            "channel, so a module on it has to read the layer's output or to be an update of the weight (delta())"
        )
    return module


def _positions(parameter: LogicalParameter, plan: Plan) -> Tensor:
    """Tuned entries, as flat positions in the module's own parameter."""
    first = parameter.start * prod(parameter.shape[1:])
    if parameter.name in plan.sparse:
        return plan.sparse[parameter.name] + first
    return torch.arange(first, first + parameter.numel)
