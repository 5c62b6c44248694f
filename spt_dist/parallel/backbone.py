"""Building a backbone in the form that an engine wants: whole on each rank, or spread over the ranks from the start.

A backbone that is spread is never whole anywhere: its modules are made on torch's meta device, and get their weights
from the checkpoint once they are spread (FSDP2; each rank reads its own rows only) or layer by layer (ZeRO-3).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from spt_dist.allocation.plan import Plan
from spt_dist.compat import start_deepspeed
from spt_dist.errors import UserError
from spt_dist.models.checkpoints import WeightsFile, backbone_state, check_sum, copy_weights, log_account
from spt_dist.models.classifier import build_classifier, create_model, fill_head, head_values
from spt_dist.models.fingerprint import fingerprint, hash_tensors
from spt_dist.models.matrices import take_inventory
from spt_dist.models.precision import shorten_frozen
from spt_dist.parallel.engines.deepspeed_config import deepspeed_config
from spt_dist.parallel.units import find_units
from spt_dist.ranks import from_rank_0
from spt_dist.sections import EngineConfig, ModelConfig
from spt_dist.tuning.inject import is_tuned, trainable_parameters

WHOLE, FSDP, ZERO3 = "whole", "fsdp", "zero3"


@dataclass(frozen=True)
class Backbone:
    """A pre-trained model with its head, and the fingerprint of its weights as the checkpoint has them."""

    model: nn.Module
    fingerprint: str


def training_form(engine: EngineConfig) -> str:
    """How the backbone lies on the ranks while it is trained."""
    if engine.type == "fsdp":
        return FSDP
    return ZERO3 if engine.type == "deepspeed" and engine.zero_stage == 3 else WHOLE


def scoring_form(engine: EngineConfig) -> str:
    """How the backbone lies on the ranks while it is scored: spread by FSDP2 where ZeRO-3 will train it."""
    return WHOLE if training_form(engine) == WHOLE else FSDP


def build_backbone(
    config: ModelConfig, engine: EngineConfig, form: str, seed: int, device: torch.device, plan: Plan | None = None
) -> Backbone:
    """Build the pre-trained model, the same under every engine and on every number of ranks. Collective.

    Args:
        config: the model.
        engine: for its ``shard_size``, ``frozen_dtype`` and DeepSpeed settings.
        form: from ``training_form`` or ``scoring_form``.
        seed: of the head, and of the whole model where there is no checkpoint.
        device: this rank's.
        plan: that will be injected, if it is known. What it trains in place is kept in fp32 and, under FSDP2, whole on
            every rank, as head and ``cls_token`` are in any case; unless it trains all of the backbone.

    Raises:
        UserError: as ``build_classifier``; the checkpoint has another SHA-256 than the config says; or the ranks can't
            be cut into groups of ``shard_size``.
    """
    verify_checkpoint(config)
    train_all = plan is not None and plan.trains_backbone
    in_place = () if plan is None or train_all else plan.parameters
    empty = create_model(config.name, config.num_classes, config.kwargs, torch.device("meta"))
    weights = None if config.checkpoint is None else WeightsFile(config.checkpoint)
    if form == WHOLE or weights is None or not _can_start_empty(empty):
        name, keep_head = config.name, config.keep_head
        model = build_classifier(name, config.num_classes, config.kwargs, config.checkpoint, seed, keep_head)
        found = fingerprint(model)
        _prepare(model, engine, train_all, in_place)
        if form == FSDP:
            shard(model.to(device), engine.shard_size, device, train_all, in_place)
        elif form == ZERO3:
            partition(model.to(device), engine)
        return Backbone(model.to(device), found)

    log_account(weights.check(empty, config.keep_head))
    found = _hash_on_rank_0(weights, empty)
    _prepare(empty, engine, train_all, in_place)
    if form == FSDP:
        shard(empty, engine.shard_size, device, train_all, in_place)
        empty.to_empty(device=device)
        copy_weights(empty, weights)
        if not config.keep_head:
            fill_head(empty, seed)
    else:
        partition(empty, engine, _reader(weights, empty, seed, device))
    reinit_non_persistent_buffers(empty)
    return Backbone(empty, found)


def verify_checkpoint(config: ModelConfig) -> None:
    """Compare the checkpoint with the SHA-256 that the config has for it. Collective; rank 0 reads the file.

    Raises:
        UserError: on every rank: there is no such file, or its SHA-256 is another.
    """
    if config.checkpoint is None or config.sha256 is None:
        return
    location, sha256 = config.checkpoint, config.sha256
    from_rank_0(lambda: check_sum(location, sha256))


def shard(
    model: nn.Module,
    shard_size: int | None,
    device: torch.device,
    train_all: bool = False,
    in_place: Collection[str] = (),
) -> None:
    """Spread a model over the ranks with FSDP2, block by block, in place, before or after its injection. Collective.

    Args:
        model: on its device, or on torch's meta device.
        shard_size: see ``EngineConfig``.
        device: this rank's.
        train_all: whether all of the backbone is trained; then nothing of it stays whole.
        in_place: names of parameters that are trained in place, beside head and ``cls_token``.

    Raises:
        UserError: the ranks can't be cut into groups of ``shard_size``.
    """
    mesh = _make_mesh(shard_size, device)
    kept = set() if train_all else _trained_anyway(model) | {model.get_parameter(name) for name in in_place}
    for unit in [*find_units(model), model]:
        # What stays gathered after an evaluation would miss the next update.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=kept)


def partition(model: nn.Module, engine: EngineConfig, read: Callable[[str, Tensor], Tensor] | None = None) -> None:
    """Spread a model over the ranks as ZeRO-3 does, layer by layer, in place. Collective.

    Args:
        model: with its values, or on torch's meta device.
        engine: for its DeepSpeed settings.
        read: for a model on the meta device: name and empty tensor -> the value, on this rank's device.
    """
    import deepspeed

    start_deepspeed()
    settings = deepspeed_config(engine, num_trained=0)
    for name, module in model.named_modules():
        carrier = nn.Module()
        for own_name, parameter in list(module.named_parameters(recurse=False)):
            if read is not None:
                value = read(f"{name}.{own_name}".lstrip("."), parameter)
                parameter = nn.Parameter(value, parameter.requires_grad)
                module.register_parameter(own_name, parameter)
            carrier.register_parameter(own_name, parameter)
        for own_name, buffer in list(module.named_buffers(recurse=False)):
            if read is not None:
                module._buffers[own_name] = read(f"{name}.{own_name}".lstrip("."), buffer)
        if carrier._parameters:
            deepspeed.zero.Init(module=carrier, config_dict_or_path=settings)


def _trained_anyway(model: nn.Module) -> set[nn.Parameter]:
    """What is trained beside a frozen backbone, as far as that is known."""
    if is_tuned(model):
        return {parameter for _, parameter in trainable_parameters(model)}
    inventory = take_inventory(model)
    return {model.get_parameter(name) for name in (*inventory.head, *inventory.always_tuned)}


def _prepare(model: nn.Module, engine: EngineConfig, train_all: bool, in_place: Collection[str]) -> None:
    # FSDP2 makes whole parameters that keep this flag as it was at their first use.
    model.requires_grad_(train_all)
    if engine.frozen_dtype is not None:
        shorten_frozen(model, getattr(torch, engine.frozen_dtype), in_place)


def _can_start_empty(model: nn.Module) -> bool:
    """Whether everything that is in no checkpoint can be computed again."""
    return all(
        hasattr(module, "init_non_persistent_buffers")
        for module in model.modules()
        if module._non_persistent_buffers_set
    )


def _reader(weights: WeightsFile, model: nn.Module, seed: int, device: torch.device) -> Callable[[str, Tensor], Tensor]:
    taken, head = set(weights.taken()), head_values(model, seed)

    def read(name: str, empty: Tensor) -> Tensor:
        if name in taken:
            return weights.read(name).to(device, empty.dtype)
        if name in head:
            return head[name].to(device)
        return torch.empty_like(empty, device=device)

    return read


def _hash_on_rank_0(weights: WeightsFile, model: nn.Module) -> str:
    """As ``fingerprint`` of the model with these weights."""
    state = sorted(backbone_state(model).items())
    return from_rank_0(lambda: hash_tensors((name, weights.read(name).to(tensor.dtype)) for name, tensor in state))


def _make_mesh(shard_size: int | None, device: torch.device) -> DeviceMesh:
    ranks = dist.get_world_size()
    if shard_size is None or shard_size == ranks:
        return init_device_mesh(device.type, (ranks,))
    if ranks % shard_size:
        raise UserError(
            f"config: engine.shard_size={shard_size} does not divide the number of ranks, {ranks}; choose a divisor, "
            "or None for all"
        )
    return init_device_mesh(device.type, (ranks // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))
