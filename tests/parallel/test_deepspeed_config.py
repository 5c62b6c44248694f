"""DeepSpeed's config: ours, the user's additions, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spt_dist import UserError
from spt_dist.parallel.engines import check_engine
from spt_dist.parallel.engines.deepspeed_config import deepspeed_config
from spt_dist.sections import EngineConfig

ZERO2, ZERO3 = (EngineConfig(type="deepspeed", zero_stage=stage) for stage in (2, 3))
# As other trainers' files look.
COMMON: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": "auto",
        "stage3_max_reuse_distance": 1e9,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "wall_clock_breakdown": False,
}


def test_what_is_always_there() -> None:
    config = deepspeed_config(ZERO2, 1234, 0.5, 3)
    assert config["gradient_clipping"] == 0.5
    assert config["gradient_accumulation_steps"] == 3
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1234}
    # A key that is left out would mean clipping at 1.0.
    assert deepspeed_config(ZERO2, 1)["gradient_clipping"] == 0.0


def test_a_file_made_for_another_trainer(tmp_path: Path) -> None:
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(COMMON), encoding="utf-8")
    for given in (str(path), COMMON):
        engine = replace(ZERO3, deepspeed=given)
        check_engine(engine)
        zero = deepspeed_config(engine, 1234)["zero_optimization"]
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
        assert zero["reduce_bucket_size"] == 1234
        assert zero["stage3_max_reuse_distance"] == 1e9
        assert deepspeed_config(engine, 1)["wall_clock_breakdown"] is False


@pytest.mark.parametrize("offload", [ZERO2, ZERO3])
def test_offloading(offload: EngineConfig) -> None:
    zero = deepspeed_config(replace(offload, offload=True), 1)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert ("offload_param" in zero) == (offload.zero_stage == 3)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (replace(ZERO2, zero_stage=4), r"engine\.zero_stage=4"),
        (EngineConfig(type="dpp"), r"engine\.type='dpp' is unknown; did you mean 'ddp'"),
        (EngineConfig(type="fsdp", offload=True), r"engine\.offload is for engine\.type='deepspeed'"),
        (EngineConfig(type="ddp", shard_size=2), r"engine\.shard_size is for engine\.type='fsdp'"),
        (EngineConfig(type="ddp", deepspeed={}), r"engine\.deepspeed is for"),
        (replace(ZERO2, zero_stage=0, offload=True), r"engine\.offload needs"),
        (replace(ZERO3, compile="inductor"), r"engine\.compile does not work with ZeRO stage 3"),
        (replace(ZERO3, amp=True, frozen_dtype="bfloat16"), r"engine\.frozen_dtype does not work"),
        (replace(ZERO2, amp=True, amp_dtype="float16"), r"amp_dtype='float16' does not work with DeepSpeed"),
        (replace(ZERO2, deepspeed="none.json"), r"engine\.deepspeed='none\.json': not a readable"),
        (replace(ZERO2, deepspeed={"train_batch_size": 8}), r"train_batch_size=8 is decided by train\.batch_size"),
        (replace(ZERO2, deepspeed={"gradient_clipping": 1.0}), r"decided by train\.clip_norm"),
        (replace(ZERO2, deepspeed={"optimizer": {"type": "Adam"}}), r"decided by train\.lr"),
        (replace(ZERO2, deepspeed={"bf16": {"enabled": True}}), r"decided by engine\.amp"),
        (replace(ZERO2, deepspeed={"zero_optimization": {"stage": 3}}), r"stage=3, but engine\.zero_stage=2"),
        (replace(ZERO2, deepspeed={"zero_optimization": {"stage": "2"}}), r"stage='2', but engine\.zero_stage=2"),
        (replace(ZERO2, deepspeed={"zero_optimization": 3}), r"zero_optimization=3 has to be an object"),
        (replace(ZERO2, deepspeed={"zero_optimization": {"foo": 1}}), r"zero_optimization\.foo=1: Extra inputs"),
        (replace(ZERO2, deepspeed={"zero_optimization": {"reduce_bucket_size": "big"}}), r"reduce_bucket_size='big'"),
        (EngineConfig(compile="indctor"), r"engine\.compile='indctor' is unknown; did you mean 'inductor'"),
    ],
)
def test_what_no_engine_can_serve(engine: EngineConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_engine(engine)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'"stage"', b"\xff\xfe{}"])
def test_a_file_that_is_no_object(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.json"):
        check_engine(replace(ZERO2, deepspeed=str(path)))
