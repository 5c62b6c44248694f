"""What a run would need, before it is run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from spt_dist.errors import UserError
from spt_dist.models.checkpoints import resolve_checkpoint
from spt_dist.models.classifier import build_classifier
from spt_dist.sections import EngineConfig, ModelConfig, RunConfig, SensitivityConfig, TrainConfig
from spt_dist.training.dry_run import GIB, DryRun, plan_run
from spt_dist.tuning.inject import inject, trainable_parameters
from spt_dist.tuning.methods import make_plan

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
PARTS_OF_STEP = {"frozen weights", "trained weights", "gradients", "optimizer state", "moving average"}


def make_config(method: dict[str, Any] | None = None, name: str = "vit_tiny_patch16_224", **sections: Any) -> RunConfig:
    """The quickstart's LoRA, with sections in the place of its own."""
    standard = {
        "model": ModelConfig(name=name, num_classes=10, kwargs=SMALL),
        "data": {"type": "digits"},
        "train": TrainConfig(epochs=1, batch_size=64),
    }
    return RunConfig(method=method or {"type": "lora", "rank": 4}, **(standard | sections))


def total(found: DryRun, phase: str) -> int:
    return sum(found.phases[phase].values())


@pytest.mark.parametrize("method", ["lora", "bias", "partial", "linear", "full"])
def test_counts_are_those_of_the_injected_model(method: str) -> None:
    config = make_config({"type": method})
    found = plan_run(config, 1)
    model = build_classifier("vit_tiny_patch16_224", 10, SMALL)
    tuned = inject(model, make_plan(method, model))
    sizes = {name: parameter.numel() for name, parameter in trainable_parameters(tuned)}
    head = sum(size for name, size in sizes.items() if name.startswith("head."))
    assert found.trainables.head == head == 970
    assert found.trainables.count == sum(sizes.values()) - head
    step = found.phases["optimizer step"]
    assert step["trained weights"] == 4 * sum(sizes.values())
    frozen = sum(parameter.numel() for parameter in tuned.parameters() if not parameter.requires_grad)
    assert step["frozen weights"] == 4 * frozen
    assert found.trainables.is_exact
    assert f"{found.trainables.count:,} trainable parameters" in found.table()


def test_positions_of_single_weights_count(tmp_path: Path) -> None:
    model = build_classifier("vit_tiny_patch16_224", 10, SMALL)
    plan = make_plan("linear", model)
    plan.sparse["blocks.0.mlp.fc1.weight"] = torch.arange(0, 960, 96)
    plan.shapes["blocks.0.mlp.fc1.weight"] = (192, 96)
    plan.save(tmp_path / "plan.safetensors")
    found = plan_run(make_config({"type": "plan", "path": str(tmp_path / "plan.safetensors")}), 1)
    assert found.trainables.count == 10
    backbone = found.trainables.backbone
    # Ten rows, one column, and for each weight its row's and column's place.
    assert found.phases["optimizer step"]["frozen weights"] == 4 * backbone + 8 * (10 + 1 + 10 + 10)


@pytest.mark.parametrize(
    ("batch", "ranks", "accumulation", "samples", "passes"), [(64, 1, 1, 64, 1), (65, 4, 1, 17, 1), (100, 3, 4, 9, 4)]
)
def test_the_batch_is_dealt_out(batch: int, ranks: int, accumulation: int, samples: int, passes: int) -> None:
    train = TrainConfig(epochs=1, batch_size=batch, accumulation=accumulation)
    found = plan_run(make_config(train=train), ranks)
    assert (found.samples, found.passes) == (samples, passes)
    alone = plan_run(make_config(train=TrainConfig(epochs=1, batch_size=samples)), 1)
    assert found.kept == alone.kept
    gradients = found.phases["training pass"]["gradients"]
    # Those of an earlier pass are there from the start.
    assert gradients == (
        4 * (found.trainables.count + 970) if passes > 1 else alone.phases["training pass"]["gradients"]
    )


@pytest.mark.parametrize(
    ("data", "kwargs", "shape"),
    [
        ({"type": "digits"}, SMALL, (3, 32, 32)),
        ({"type": "digits", "image_size": 48}, SMALL | {"img_size": 48}, (3, 48, 48)),
    ],
)
def test_images_have_the_size_of_the_data(
    data: dict[str, Any], kwargs: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    model = ModelConfig(name="vit_tiny_patch16_224", num_classes=10, kwargs=kwargs)
    assert plan_run(make_config(data=data, model=model), 1).image_shape == shape


def test_spt_before_its_scores() -> None:
    found = plan_run(make_config({"type": "spt", "budget": 4096, "rank": 4}), 2)
    trainables = found.trainables
    assert (trainables.count, trainables.always, trainables.is_exact) == (4096, 96, False)
    assert list(found.phases) == ["scoring", "training pass", "optimizer step"]
    assert found.phases["optimizer step"]["trained weights"] == 4 * (4096 + 970)
    assert found.phases["training pass"]["gradients"] == 4 * (4096 + 970)
    assert found.phases["scoring"]["scores"] == 4 * trainables.backbone
    assert found.phases["scoring"]["frozen weights"] == 4 * (trainables.backbone + 970)
    assert "4,096" in found.table() and "keeps most" in found.table()
    # With LoRA on two matrices a block much less is kept.
    assert found.kept > 1.2 * plan_run(make_config(), 2).kept


def test_saved_scores_need_no_pass() -> None:
    config = make_config({"type": "spt", "budget": 4096}, sensitivity=SensitivityConfig(scores="scores"))
    assert list(plan_run(config, 1).phases) == ["training pass", "optimizer step"]


def test_scoring_follows_its_section() -> None:
    method = {"type": "spt", "budget": 4096}

    def needs(ranks: int = 1, **sensitivity: Any) -> int:
        config = make_config(method, sensitivity=SensitivityConfig(**sensitivity))
        return plan_run(config, ranks).phases["scoring"]["activations and temporaries"]

    eight = needs(batch_size=8)
    assert needs(batch_size=32) > 3 * eight
    assert needs(batch_size=32, num_samples=8) == eight
    assert needs(4, batch_size=32, num_samples=32) == eight
    assert needs(batch_size=32, memory_limit_gib=1e-6) == needs(batch_size=1)
    assert needs(batch_size=8, dtype="bfloat16") < eight


@pytest.mark.parametrize(
    ("engine", "smaller"),
    [
        ({"type": "fsdp"}, {"frozen weights"}),
        ({"type": "deepspeed", "zero_stage": 1}, {"optimizer state"}),
        ({"type": "deepspeed", "zero_stage": 2}, {"gradients", "optimizer state"}),
        ({"type": "deepspeed", "zero_stage": 3}, PARTS_OF_STEP - {"moving average"}),
    ],
)
def test_engines_share_out(engine: dict[str, Any], smaller: set[str]) -> None:
    ddp = plan_run(make_config(), 8).phases["optimizer step"]
    found = plan_run(make_config(engine=EngineConfig(**engine)), 8).phases["optimizer step"]
    for part in PARTS_OF_STEP - {"moving average"}:
        assert (found[part] < ddp[part]) == (part in smaller), part


def test_fsdp_spreads_full_fine_tuning() -> None:
    config = make_config({"type": "full"}, engine=EngineConfig(type="fsdp"))
    found = plan_run(config, 8)
    own = 4 * (found.trainables.backbone + found.trainables.head) / 8
    step = found.phases["optimizer step"]
    assert step["trained weights"] == step["gradients"] == pytest.approx(own, abs=4)
    assert step["optimizer state"] == pytest.approx(2 * own, abs=8)
    assert step.get("frozen weights") == 0


def test_gradients_of_the_densest_plan_do_not_count() -> None:
    """With one image they would take more than the activations."""
    method = {"type": "spt", "budget": 4096, "rank": 64}
    found = plan_run(make_config(method, train=TrainConfig(epochs=1, batch_size=1)), 1)
    parts = found.phases["training pass"]
    assert parts["gradients"] == 4 * (4096 + 970)
    assert parts["activations and temporaries"] >= found.kept


def test_amp_checkpointing_and_short_weights_save_memory() -> None:
    plain = plan_run(make_config(), 1)
    amp = plan_run(make_config(engine=EngineConfig(amp=True)), 1)
    short = plan_run(make_config(engine=EngineConfig(amp=True, frozen_dtype="bfloat16")), 1)
    blocks = plan_run(make_config(engine=EngineConfig(activation_checkpointing=True)), 1)
    assert amp.kept < 0.8 * plain.kept
    assert blocks.kept < 0.5 * plain.kept
    # Two blocks of 8 D^2 weights in Linear layers, two bytes less each.
    before, after = (run.phases["optimizer step"]["frozen weights"] for run in (amp, short))
    assert before - after == 2 * 2 * 8 * 96**2
    # Autocast keeps no copies of weights that are short already.
    assert short.kept < amp.kept
    average = TrainConfig(epochs=1, batch_size=64, ema=0.99)
    assert total(plan_run(make_config(train=average), 1), "optimizer step") - total(plain, "optimizer step") == 4 * (
        plain.trainables.count + 970
    )


@pytest.mark.parametrize("method", ["lora", "full", "linear"])
def test_the_largest_batch_fits_and_one_more_does_not(method: str) -> None:
    limit = 0.25
    found = plan_run(make_config({"type": method}), 2, memory_gib=limit)
    assert found.fitting is not None and found.fitting > 1
    for samples, fits in ((found.fitting, True), (found.fitting + 1, False)):
        train = TrainConfig(epochs=1, batch_size=2 * samples)
        run = plan_run(make_config({"type": method}, train=train), 2)
        assert (run.peak <= limit * GIB) == fits
    assert f"train.batch_size={2 * found.fitting:,}" in found.table()


def test_what_does_not_fit_is_said() -> None:
    assert plan_run(make_config(), 1, memory_gib=0.0005).fitting == 0
    assert "does not fit, whatever" in plan_run(make_config(), 1, memory_gib=0.0005).table()
    config = make_config({"type": "spt", "budget": 4096}, train=TrainConfig(epochs=1, batch_size=1))
    found = plan_run(config, 1, memory_gib=0.004)
    assert found.fitting and "does not fit (scoring)" in found.table()


def test_the_table_and_the_dict_hold_the_same() -> None:
    found = plan_run(
        make_config({"type": "full"}, engine=EngineConfig(type="deepspeed", zero_stage=3, offload=True)), 4
    )
    content = json.loads(json.dumps(found.to_dict()))
    assert content["phases"] == found.phases
    assert content["peak"] == found.peak == max(sum(parts.values()) for parts in content["phases"].values())
    assert content["host"] == found.host > 0
    for parts in found.phases.values():
        assert (
            f"{sum(parts.values()) / 2**20:,.1f} MiB" in found.table()
            or f"{sum(parts.values()) / GIB:,.2f} GiB" in (found.table())
        )
    assert "in the CPU's memory" in found.table()
    assert "deepspeed (ZeRO 3, offload) on 4 ranks" in found.table()


def test_the_checkpoint_is_looked_at(tmp_path: Path) -> None:
    demo = ModelConfig(name="vit_tiny_patch16_224", num_classes=10, kwargs=SMALL | {"depth": 6})

    def run(location: str | None) -> DryRun:
        return plan_run(make_config(model=replace(demo, checkpoint=location)), 1)

    assert run(None).checkpoint is None
    found = run("package://demo_vit.safetensors").checkpoint
    assert found is not None and found.size is not None and found.dtypes == ("F32",)
    absent = run(str(tmp_path / "later.safetensors"))
    assert absent.checkpoint is not None and absent.checkpoint.size is None
    assert "later.safetensors is not there yet" in absent.table()
    save_file({"norm.weight": torch.ones(96)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit this backbone"):
        run(str(tmp_path / "other.safetensors"))


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    demo = ModelConfig(name="vit_tiny_patch16_224", num_classes=10, kwargs=SMALL | {"depth": 6})
    state = load_file(resolve_checkpoint("package://demo_vit.safetensors"))
    save_torch_state_dict(state, tmp_path, max_shard_size=200_000)
    location = str(tmp_path / "model.safetensors.index.json")
    found = plan_run(make_config(model=replace(demo, checkpoint=location)), 1).checkpoint
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert found is not None and found.size == sum(path.stat().st_size for path in files)


def test_the_checkpoint_has_to_be_the_one_that_is_meant(caplog: pytest.LogCaptureFixture) -> None:
    demo = ModelConfig(
        name="vit_tiny_patch16_224",
        num_classes=10,
        kwargs=SMALL | {"depth": 6},
        checkpoint="package://demo_vit.safetensors",
    )
    with caplog.at_level("INFO", logger="spt_dist"):
        plan_run(make_config(model=demo), 1)
    assert "demo_vit.safetensors: 78 tensors" in caplog.text and "blocks.*.attn.qkv.weight" in caplog.text
    with pytest.raises(UserError, match=r"demo_vit\.safetensors: its SHA-256 is .*, but model\.sha256='01234567'"):
        plan_run(make_config(model=replace(demo, sha256="01234567")), 1)
    with pytest.raises(UserError, match=r"demo_vit\.safetensors: holds no head\.bias"):
        plan_run(make_config(model=replace(demo, keep_head=True)), 1)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": ModelConfig(name="vit_tiny_patch99", num_classes=10)}, "timm has no such model"),
        ({"model": ModelConfig(name="vit_tiny_patch16_224", num_classes=10, kwargs={"depht": 2})}, "model.kwargs"),
        ({"data": {"type": "digits", "image_size": 40}}, "does not take the data's images of shape"),
        ({"data": {"type": "digits", "image_sise": 32}}, "did you mean 'image_size'"),
        ({"data": {"type": "digit"}}, "did you mean 'digits'"),
        ({"method": {"type": "lora", "targets": ["w"]}}, "'w' is no operation"),
        ({"method": {"type": "spt", "budget": 5}}, "not enough for cls_token"),
        ({"method": {"type": "spt", "budget": 10**9}}, "above the backbone"),
        ({"model": ModelConfig(name="resnet18", num_classes=10)}, "keeps running statistics"),
    ],
)
def test_mistakes_are_refused_as_in_the_run(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_run(make_config(**sections), 1)


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("vit_base_patch16_224", 85_798_656),
        ("vit_large_patch16_224", 303_301_632),
        ("vit_huge_patch14_224", 630_764_800),
        ("swin_base_patch4_window7_224", 86_743_224),
        ("convnext_base", 87_566_464),
        ("deit3_base_patch16_224", 85_816_320),
    ],
)
def test_published_models_at_full_size(name: str, backbone: int) -> None:
    model = ModelConfig(name=name, num_classes=10)
    found = plan_run(make_config({"type": "linear"}, model=model, data={"type": "digits", "image_size": 224}), 1)
    assert found.trainables.backbone == backbone
    assert found.phases["training pass"]["frozen weights"] >= 4 * backbone
