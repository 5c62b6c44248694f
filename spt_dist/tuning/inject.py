"""Putting a plan onto a backbone."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.matrices import LogicalParameter, take_inventory
from spt_dist.tables import format_table
from spt_dist.tuning.layers import TunedLayerNorm, TunedLinear
from spt_dist.tuning.sparse import SparseBlock
from spt_dist.tuning.vectors import VectorDelta


def inject(model: nn.Module, plan: Plan) -> nn.Module:
    """Freeze ``model`` and make trainable what ``plan`` says, in place.

    The outputs stay what they were, bit for bit: every update starts at zero. The plan and the fingerprint of the
    untouched backbone stay with the model as ``spt_plan`` and ``spt_fingerprint``.

    Args:
        model: the backbone the plan was made for, with any head.
        plan: from ``allocate`` or a file.

    Returns:
        The same model.

    Raises:
        UserError: the model is tuned already; a name of the plan does not exist in it or has another shape.
    """
    if is_tuned(model):
        raise UserError("inject: this model has been injected already; merge it or build the backbone anew")
    placed = _find_places(model, plan)
    _check_own_parameters(model, plan)
    print_of_backbone = fingerprint(model)
    model.requires_grad_(False)
    for module_name, parameters in placed.items():
        module = model.get_submodule(module_name)
        tuned = (
            _tune_linear(module, parameters, plan)
            if isinstance(module, nn.Linear)
            else _tune_norm(module, parameters, plan)
        )
        replace_module(model, module_name, tuned)
    for name in [*plan.parameters, *plan.head]:
        model.get_parameter(name).requires_grad_(True)
    model.spt_plan = plan  # type: ignore[assignment]  # Module declares its attributes as tensors and modules
    model.spt_fingerprint = print_of_backbone  # type: ignore[assignment]
    return model


def is_tuned(model: nn.Module) -> bool:
    """Whether a plan has been injected into the model."""
    return isinstance(getattr(model, "spt_plan", None), Plan)


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that is trained, ``(name, parameter)``, the head's included."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters of the model are trained: the plan's table if it has one, head and total."""
    sizes = {name: parameter.numel() for name, parameter in trainable_parameters(model)}
    plan = getattr(model, "spt_plan", None)
    head = sum(sizes[name] for name in plan.head) if plan is not None else 0
    total = sum(parameter.numel() for parameter in model.parameters())
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
    parent, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(parent), own_name, module)


def _find_places(model: nn.Module, plan: Plan) -> dict[str, list[LogicalParameter]]:
    known = take_inventory(model).by_name()
    placed: dict[str, list[LogicalParameter]] = defaultdict(list)
    for name in [*plan.matrices, *plan.vectors, *plan.sparse]:
        if name not in known:
            raise UserError(
                f"plan: {name} is no weight of this {type(model).__name__}; the plan is for another backbone"
            )
        if known[name].shape != plan.shapes[name]:
            raise UserError(f"plan: {name} has shape {plan.shapes[name]}, this model's has {known[name].shape}")
        placed[known[name].module].append(known[name])
    return placed


def _check_own_parameters(model: nn.Module, plan: Plan) -> None:
    own = dict(model.named_parameters())
    for name in [*plan.parameters, *plan.head]:
        if name not in own:
            raise UserError(
                f"plan: {name} is no parameter of this {type(model).__name__}; the plan is for another model"
            )
        if name in plan.shapes and plan.shapes[name] != tuple(own[name].shape):
            raise UserError(f"plan: {name} has shape {plan.shapes[name]}, this model's has {tuple(own[name].shape)}")


def _tune_linear(linear: nn.Linear, parameters: list[LogicalParameter], plan: Plan) -> TunedLinear:
    tuned = TunedLinear(linear)
    device = linear.weight.device
    weights, biases = [], []
    for parameter in parameters:
        if parameter.name in plan.matrices:
            key = parameter.name.split(".")[-2] if parameter.numel < linear.weight.numel() else "whole"
            tuned.add_low_rank(key, parameter.rows, plan.rank)
        elif parameter.is_matrix:
            weights.append(plan.sparse[parameter.name] + parameter.start * linear.in_features)
        else:
            biases.append(_positions(parameter, plan))
    if weights:
        tuned.sparse = SparseBlock(torch.cat(weights), linear.in_features, device)
    if biases:
        tuned.bias_delta = VectorDelta(torch.cat(biases), device)
    return tuned


def _tune_norm(norm: nn.Module, parameters: list[LogicalParameter], plan: Plan) -> TunedLayerNorm:
    assert isinstance(norm, nn.LayerNorm)
    tuned = TunedLayerNorm(norm)
    for parameter in parameters:
        delta = VectorDelta(_positions(parameter, plan), norm.weight.device)
        setattr(tuned, f"{parameter.parameter}_delta", delta)
    return tuned


def _positions(parameter: LogicalParameter, plan: Plan) -> Tensor:
    """Tuned entries of a vector, as positions in the module's own parameter."""
    if parameter.name in plan.sparse:
        return plan.sparse[parameter.name] + parameter.start
    return torch.arange(parameter.start, parameter.start + parameter.numel)
