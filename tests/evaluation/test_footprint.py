"""What engines share out, against numbers by hand: ViT-B/16 with a head of ten classes."""

from typing import Any

import pytest
import torch

from spt_dist.evaluation.footprint import Share, Weights, share_out, share_scoring, weigh
from spt_dist.models.classifier import create_model
from spt_dist.models.matrices import take_inventory
from spt_dist.sections import EngineConfig

BACKBONE, HEAD, TOKEN = 85_798_656, 7_690, 768
ALL = BACKBONE + HEAD
# Norms, projections and their biases of one block of width 768.
BLOCK = 4 * 768 + (768 + 1) * 3 * 768 + (768 + 1) * 768 + (768 + 1) * 3072 + (3072 + 1) * 768
OUTSIDE = BACKBONE - 12 * BLOCK
LORA = 294_912
# DeepSpeed's default, in bytes.


@pytest.fixture(scope="module")
def model() -> Any:
    return create_model("vit_base_patch16_224", 10, {}, torch.device("meta"))


@pytest.fixture(scope="module")
def lora(model: Any) -> Weights:
    head = take_inventory(model).head
    return weigh(model, head, head, LORA + HEAD, trains_all=False)


@pytest.fixture(scope="module")
def full(model: Any) -> Weights:
    return weigh(model, list(dict(model.named_parameters())), (), ALL, trains_all=True)


def share(weights: Weights, ranks: int, **engine: Any) -> Share:
    return share_out(weights, EngineConfig(**engine), ranks)


def test_weights_are_counted(lora: Weights, full: Weights) -> None:
    assert lora.frozen == 4 * BACKBONE
    assert lora.units == full.units == (4 * BLOCK,) * 12
    assert lora.root == 4 * OUTSIDE
    assert full.root == 4 * (OUTSIDE + HEAD)
    assert full.frozen == lora.buffers == 0
    assert sum(full.sizes) == ALL


def test_nested_blocks_hold_only_their_own() -> None:
    swin = create_model("swin_tiny_patch4_window7_224", 10, {}, torch.device("meta"))
    weights = weigh(swin, (), (), 0, trains_all=False)
    assert sum(weights.units) + weights.root == weights.frozen == 4 * sum(p.numel() for p in swin.parameters())
    # Twelve blocks, and the four stages around them, three of which have a layer that merges patches.
    assert len(weights.units) == 12 + 3
    assert weights.buffers == sum(8 * b.numel() for b in swin.buffers() if b.dtype == torch.int64) + sum(
        4 * b.numel() for b in swin.buffers() if b.dtype == torch.float32
    )


@pytest.mark.parametrize(("ranks", "buckets"), [(1, 0), (8, 1)])
@pytest.mark.parametrize("engine", [{"type": "ddp"}, {"type": "deepspeed", "zero_stage": 0}])
def test_whole_replicas(full: Weights, lora: Weights, engine: dict[str, Any], ranks: int, buckets: int) -> None:
    for weights, trained, frozen in ((full, ALL, 0), (lora, LORA + HEAD, BACKBONE)):
        assert share(weights, ranks, **engine) == Share(
            frozen=4 * frozen,
            trained=4 * trained,
            gathered=0,
            gradients=4 * trained,
            optimizer=8 * trained,
            buckets=4 * trained * buckets,
            at_step=4 * trained,
        )


@pytest.mark.parametrize(("shard_size", "parts"), [(None, 8), (4, 4)])
def test_fsdp_spreads_what_is_frozen(lora: Weights, shard_size: int | None, parts: int) -> None:
    trained = LORA + HEAD
    assert share(lora, 8, type="fsdp", shard_size=shard_size) == Share(
        frozen=4 * BACKBONE // parts,
        trained=4 * trained,
        gathered=4 * (2 * BLOCK + OUTSIDE),
        gradients=4 * trained,
        optimizer=8 * trained,
        buckets=0,
        at_step=8 * trained,
    )


def test_fsdp_spreads_everything_where_the_backbone_is_trained(full: Weights) -> None:
    own = 4 * -(-ALL // 8)
    found = share(full, 8, type="fsdp")
    assert (found.trained, found.gradients, found.optimizer) == pytest.approx((own, own, 2 * own), rel=1e-6)
    assert found.gathered == 4 * (2 * BLOCK + OUTSIDE + HEAD)
    assert found.buckets == 2 * 4 * BLOCK
    assert not found.keeps_gradients


def test_fsdp_with_a_copy_on_each_rank_gathers_nothing(lora: Weights) -> None:
    found = share(lora, 8, type="fsdp", shard_size=1)
    assert (found.frozen, found.gathered) == (4 * BACKBONE, 0)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(full: Weights, stage: int, offload: bool) -> None:
    whole, part = 4 * ALL, 4 * -(-ALL // 8)
    found = share(full, 8, type="deepspeed", zero_stage=stage, offload=offload)
    away = 0 if offload else 1
    # Stage 3 steps its part of the weights themselves; all else an fp32 copy of the part.
    state = (2 if stage == 3 and not offload else 3) * part
    assert found.trained == pytest.approx(part * away if stage == 3 else whole, abs=8)
    assert found.gradients == pytest.approx((whole if stage == 1 else part) * away, abs=8)
    assert found.optimizer == pytest.approx(state * away, abs=24)
    assert found.host == pytest.approx((state + part + (part if stage == 3 else 0)) * offload, abs=40)
    assert found.buckets == whole
    assert found.keeps_gradients == (stage == 1)
    # What is fetched ahead, and what is too small to be spread.
    small = 12 * (4 * 768 + 2 * 768 + 3072 + 2304 - 768) + 4 * 768 + HEAD
    assert found.gathered == pytest.approx(4 * (10_000_000 + small) if stage == 3 else 0, rel=0.02)


def test_zero_takes_the_users_settings(lora: Weights) -> None:
    zero = {
        "reduce_bucket_size": 1000,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 768,
    }
    found = share(lora, 4, type="deepspeed", zero_stage=3, deepspeed={"zero_optimization": zero})
    assert found.buckets == 4 * 1000
    assert found.frozen == BACKBONE
    # The largest layer, and what has at most 768 weights: biases of 768, norms, cls_token, the head's bias.
    small = 12 * (4 * 768 + 2 * 768) + 2 * 768 + 768 + 768 + 10
    assert found.gathered == 4 * (768 * 3072 + small)
    overlapping = {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}}
    assert share(lora, 4, type="deepspeed", zero_stage=2, deepspeed=overlapping).buckets == 8 * 1000


@pytest.mark.parametrize(
    ("engine", "ranks", "shard_sums", "weights", "gathered", "scores"),
    [
        ({"type": "ddp"}, 8, None, ALL, 0, BACKBONE),
        ({"type": "ddp"}, 8, True, ALL, 0, BACKBONE // 8 + 2 * 2**23),
        ({"type": "deepspeed", "zero_stage": 2}, 8, None, ALL, 0, BACKBONE),
        ({"type": "fsdp"}, 8, None, (BACKBONE - TOKEN) // 8 + HEAD + TOKEN, 1, BACKBONE // 8 + 2 * 2**23),
        ({"type": "fsdp"}, 8, False, (BACKBONE - TOKEN) // 8 + HEAD + TOKEN, 1, BACKBONE),
        ({"type": "fsdp", "shard_size": 2}, 16, None, (BACKBONE - TOKEN) // 2 + HEAD + TOKEN, 1, BACKBONE // 16 * 3),
        ({"type": "deepspeed", "zero_stage": 3}, 8, None, (BACKBONE - TOKEN) // 8 + HEAD + TOKEN, 1, None),
        ({"type": "fsdp"}, 1, None, ALL, 0, BACKBONE),
    ],
)
def test_scoring(
    model: Any,
    engine: dict[str, Any],
    ranks: int,
    shard_sums: bool | None,
    weights: int,
    gathered: int,
    scores: int | None,
) -> None:
    inventory = take_inventory(model)
    counted = weigh(model, (), [*inventory.head, *inventory.always_tuned], 0, trains_all=False)
    found = share_scoring(counted, BACKBONE, EngineConfig(**engine), ranks, shard_sums)
    assert found.weights == pytest.approx(4 * weights, abs=8)
    assert found.gathered == gathered * 4 * (2 * BLOCK + OUTSIDE - TOKEN)
    if scores is not None:
        assert found.scores == pytest.approx(4 * scores, abs=16)
