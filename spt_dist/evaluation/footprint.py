"""How engines share out weights, gradients and optimizer state over the ranks, in bytes.

Arithmetic only; what a pass over samples takes comes from ``rehearsal``.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spt_dist.parallel.backbone import FSDP, scoring_form
from spt_dist.parallel.engines.deepspeed_config import deepspeed_config
from spt_dist.parallel.units import find_units
from spt_dist.sections import EngineConfig
from spt_dist.sensitivity.buffers import BUCKET_SIZE

FP32 = 4
# DeepSpeed's own values for what our config leaves out, in numbers, not bytes.
_ZERO_DEFAULTS = {
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


@dataclass(frozen=True)
class Weights:
    """The weights of a tuned model; what is trained is fp32.

    Attributes:
        frozen: bytes of the frozen parameters.
        trained: number of the trained parameters, the head's included.
        buffers: bytes of the buffers, which every rank holds.
        units: bytes of what FSDP2 gathers at a time: each block's own weights.
        root: bytes of its last unit, what lies outside the blocks, which stays gathered meanwhile.
        sizes: number of weights in each parameter of the backbone and its head.
        trains_all: whether the whole backbone is trained.
        moments: numbers that the optimizer remembers of each trained one.
    """

    frozen: int
    trained: int
    buffers: int
    units: tuple[int, ...]
    root: int
    sizes: tuple[int, ...]
    trains_all: bool
    moments: int = 2


@dataclass(frozen=True)
class Share:
    """What one rank holds, in bytes of its device's memory where nothing else is said.

    Attributes:
        frozen, trained: its weights.
        gathered: other ranks' weights that it borrows in a pass.
        gradients: once the backward pass is over.
        optimizer: its moments, and fp32 copies of the weights where the engine makes them.
        buckets: room for gradients on their way to other ranks in the backward pass.
        at_step: temporary tensors of the step: AdamW's own, and flattened gradients.
        host: bytes in the CPU's memory.
        keeps_gradients: whether gradients are whole on the rank and stay there until the step.
    """

    frozen: int
    trained: int
    gathered: int
    gradients: int
    optimizer: int
    buckets: int
    at_step: int
    host: int = 0
    keeps_gradients: bool = True


def weigh(
    model: nn.Module, in_place: Collection[str], whole: Collection[str], num_trained: int, trains_all: bool
) -> Weights:
    """Count the weights of a model that is yet to be injected, on any device.

    Args:
        model: the backbone with its head.
        in_place: names of the parameters that are trained in place.
        whole: names of parameters that FSDP2 does not shard.
        num_trained: how many parameters will be trained.
        trains_all: whether these are all.
    """
    named = dict(model.named_parameters())
    left = {id(parameter) for name, parameter in named.items() if name not in whole}
    units = []
    for unit in find_units(model):
        own = [parameter for parameter in unit.parameters() if id(parameter) in left]
        left.difference_update(map(id, own))
        units.append(bytes_of(own))
    frozen = [parameter for name, parameter in named.items() if name not in in_place]
    return Weights(
        frozen=bytes_of(frozen),
        trained=num_trained,
        buffers=bytes_of(model.buffers()),
        units=tuple(units),
        root=bytes_of(parameter for parameter in named.values() if id(parameter) in left),
        sizes=tuple(parameter.numel() for parameter in named.values()),
        trains_all=trains_all,
    )


def share_out(weights: Weights, engine: EngineConfig, world_size: int) -> Share:
    """What a rank holds while it trains."""
    if engine.type == "fsdp":
        return _fsdp(weights, engine.shard_size or world_size, world_size)
    if engine.type == "deepspeed" and engine.zero_stage:
        settings = _ZERO_DEFAULTS | deepspeed_config(engine, weights.trained)["zero_optimization"]
        return _zero(weights, settings, engine, world_size)
    trained = FP32 * weights.trained
    return Share(
        frozen=weights.frozen + weights.buffers,
        trained=trained,
        gathered=0,
        gradients=trained,
        optimizer=weights.moments * trained,
        # DistributedDataParallel's buckets, or the flattened gradients of DeepSpeed's stage 0.
        buckets=trained if world_size > 1 else 0,
        at_step=trained,
    )


@dataclass(frozen=True)
class ScoringShare:
    """What one rank holds in stage 1, in bytes: its ``weights``, those it borrows, and sums of ``scores``."""

    weights: int
    gathered: int
    scores: int


def share_scoring(
    weights: Weights, num_scores: int, engine: EngineConfig, world_size: int, shard_sums: bool | None
) -> ScoringShare:
    """What a rank holds while it scores.

    Args:
        weights: of the model before injection: nothing is trained.
        num_scores: how many weights are scored.
        engine: for the form in which it wants the backbone.
        world_size: number of ranks.
        shard_sums: see ``estimate_sensitivity``.
    """
    is_spread = scoring_form(engine) == FSDP
    shard_size = (engine.shard_size or world_size) if is_spread else 1
    spread = sum(weights.units) + weights.root
    scores = FP32 * num_scores
    if world_size > 1 and (is_spread if shard_sums is None else shard_sums):
        own = _part(scores, world_size)
        scores = own + 2 * min(own, FP32 * BUCKET_SIZE)
    return ScoringShare(
        weights=weights.frozen - spread + _part(spread, shard_size) + weights.buffers,
        gathered=gathered_by_fsdp(weights) if shard_size > 1 else 0,
        scores=scores,
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the values of some tensors, also of those without memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gathered_by_fsdp(weights: Weights) -> int:
    """Most bytes that FSDP2 has gathered at a time: the unit that runs, the next one on its way, and the root."""
    return sum(sorted(weights.units)[-2:]) + weights.root


def _fsdp(weights: Weights, shard_size: int, world_size: int) -> Share:
    trained = FP32 * weights.trained
    gathered = gathered_by_fsdp(weights) if shard_size > 1 else 0
    if not weights.trains_all:
        return Share(
            frozen=_part(weights.frozen, shard_size) + weights.buffers,
            trained=trained,
            gathered=gathered,
            gradients=trained,
            optimizer=weights.moments * trained,
            buckets=0,
            # The gradients flattened, and divided by the number of ranks; AdamW's one copy comes later.
            at_step=2 * trained if world_size > 1 else trained,
        )
    own = _part(trained, shard_size)
    return Share(
        frozen=weights.buffers,
        trained=own,
        gathered=gathered,
        gradients=own,
        optimizer=weights.moments * own,
        # A unit's whole gradients, and the buffer from which they are reduced.
        buckets=2 * max(weights.units, default=weights.root) if shard_size > 1 else 0,
        at_step=own,
        keeps_gradients=False,
    )


def _zero(weights: Weights, settings: Mapping[str, Any], engine: EngineConfig, world_size: int) -> Share:
    """DeepSpeed's stages 1 to 3."""
    stage = engine.zero_stage
    trained, own = FP32 * weights.trained, _part(FP32 * weights.trained, world_size)
    # Stages 1 and 2 step an fp32 copy of the rank's part, stage 3 the part itself, unless that is in the CPU's memory.
    copies = own if stage < 3 or engine.offload else 0
    state = weights.moments * own + copies
    frozen, gradients = weights.frozen, trained if stage == 1 else own
    if stage == 3:
        frozen, trained = _part(frozen, world_size), own
    host = 0
    if engine.offload:
        # The rank's part of the gradients goes with the optimizer's state.
        host, state, gradients = state + own, 0, 0
        if stage == 3:
            host, frozen, trained = host + frozen + trained, 0, 0
    # Stages 1 and 2 have two buckets where communication overlaps with the backward pass.
    buckets = 2 if stage < 3 and settings.get("overlap_comm") else 1
    return Share(
        frozen=frozen + weights.buffers,
        trained=trained,
        gathered=_gathered_by_zero(weights, settings) if stage == 3 and world_size > 1 else 0,
        gradients=gradients,
        optimizer=state,
        buckets=FP32 * int(settings["reduce_bucket_size"]) * buckets,
        at_step=0 if engine.offload else own,
        host=host,
        keeps_gradients=stage == 1,
    )


def _gathered_by_zero(weights: Weights, settings: Mapping[str, Any]) -> int:
    """Most bytes that ZeRO-3 has gathered at a time.

    A layer's weights stay gathered if the pass comes back to it within ``stage3_max_reuse_distance`` weights: at the
    turn from forward to backward those of the last layers, of half as many weights. Beside them are the layers that run
    and are fetched ahead.
    """
    small = sum(size for size in weights.sizes if size <= int(settings["stage3_param_persistence_threshold"]))
    kept = int(settings["stage3_max_reuse_distance"]) // 2
    ahead = max(int(settings["stage3_prefetch_bucket_size"]), max(weights.sizes))
    most = min(kept + ahead, int(settings["stage3_max_live_parameters"])) + small
    return FP32 * min(most, sum(weights.sizes))


def _part(size: int, ranks: int) -> int:
    return -(-size // ranks)
