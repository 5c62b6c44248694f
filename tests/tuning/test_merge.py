"""Merging and its inverse, against the tuned model and the untouched backbone."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from spt_dist import UserError, inject, load_delta, merge, save_delta, unmerge
from spt_dist.allocation.kinds import RELEASED_MODULES
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.plans_for_tests import MODELS, disturb, make_images, make_model, random_plan


@pytest.mark.parametrize("kind", MODELS)
def test_merge_is_exact_in_float64(kind: str) -> None:
    model, (images, _) = make_model(kind).double(), make_images(kind)
    tuned = inject(model, random_plan(model, 11)).double()
    disturb(tuned)
    outputs = tuned(images.double())
    merged = merge(tuned)
    assert torch.allclose(merged(images.double()), outputs, rtol=1e-12, atol=1e-12)
    fresh = make_model(kind).double()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(images.double()), merged(images.double()))


def test_merge_rounds_once_in_bfloat16() -> None:
    model = make_vit().bfloat16()
    tuned = inject(model, random_plan(model, 11))
    disturb(tuned)
    images = make_samples(3)[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tuned(images).float()
    merged = merge(tuned)
    assert merged.get_parameter("blocks.0.mlp.fc1.weight").dtype == torch.bfloat16
    assert (merged(images).float() - outputs).abs().max() < 0.1 * outputs.abs().max()


def test_adapters_and_prompts_stay_and_say_why(caplog: pytest.LogCaptureFixture) -> None:
    """What a weight can hold is merged, and the rest goes on as a tuned model."""
    model, (images, _) = make_vit().double(), make_samples(3)
    tuned = inject(model, random_plan(model, 4, ("adapter", "lora", "prompt"), RELEASED_MODULES)).double()
    disturb(tuned)
    with caplog.at_level(logging.WARNING):
        merged = merge(tuned)
    assert torch.allclose(merged(images.double()), tuned(images.double()), rtol=1e-12, atol=1e-12)
    staying = {name for name, kind in tuned.spt_plan.matrices.items() if kind != "lora"}
    assert 0 < len(staying) < len(tuned.spt_plan.matrices)
    assert merged.spt_plan.matrices.keys() == staying
    assert f"{len(staying)} modules stay" in caplog.text
    assert "adapter, prompt" in caplog.text
    assert merged.spt_plan.num_trainable == merged.spt_plan.num_structured
    assert torch.equal(merge(merged)(images.double()), merged(images.double()))


def test_dropout_stays_with_what_stays() -> None:
    model, (images, _) = make_vit(), make_samples(3)
    merged = merge(inject(model, random_plan(model, 4, ("adapter",), RELEASED_MODULES)))
    outputs = merged(images)
    merged.train()
    assert not torch.allclose(merged(images), merged(images))
    merged.eval()
    assert torch.equal(merged(images), outputs)


@pytest.mark.parametrize("kind", MODELS)
def test_unmerging_gives_the_backbone_back(kind: str, tmp_path: Path) -> None:
    """In float64 to a rounding, in fp32 to two of fp32's; what was trained in place bit for bit."""
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 5e-7)):
        model = make_model(kind).to(dtype)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        tuned = inject(model, random_plan(model, 11))
        disturb(tuned)
        save_delta(tuned, tmp_path / "task.safetensors")
        merged = merge(tuned)
        again = unmerge(merged, tmp_path / "task.safetensors")
        assert not hasattr(again, "spt_plan")
        assert again.state_dict().keys() == before.keys()
        head = tuned.spt_plan.head
        for name, value in again.state_dict().items():
            wanted = merged.state_dict()[name] if name in head else before[name]
            assert torch.allclose(value, wanted, rtol=tolerance, atol=tolerance), name
        for name in tuned.spt_plan.parameters:
            assert torch.equal(again.get_parameter(name), before[name])


def test_models_that_were_not_merged_from_a_task_are_not_unmerged(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    tuned = inject(make_vit(), random_plan(make_vit(), 11))
    disturb(tuned)
    save_delta(tuned, path)
    with pytest.raises(UserError, match="nothing was merged into this model, it is the task's backbone"):
        unmerge(make_vit(), path)
    with pytest.raises(UserError, match="not all of it was merged into this model"):
        unmerge(tuned, path)
    other = inject(make_vit(), random_plan(make_vit(), 11))
    disturb(other, seed=2)
    with pytest.raises(UserError, match="was not merged from it, since their cls_token differ"):
        unmerge(merge(other), path)
    full = inject(make_vit(), make_plan("full", make_vit()))
    disturb(full)
    save_delta(full, path)
    with pytest.raises(UserError, match="does not hold what cls_token was before training"):
        unmerge(merge(full), path)


def test_merged_weights_fit_the_architecture_strictly(tmp_path: Path) -> None:
    tuned = inject(make_vit(), random_plan(make_vit(), 11))
    disturb(tuned)
    save_delta(tuned, tmp_path / "task.safetensors")
    merged = merge(load_delta(make_vit(), tmp_path / "task.safetensors"))
    plain: nn.Module = make_vit(seed=5)
    plain.load_state_dict(merged.state_dict(), strict=True)
    images, _ = make_samples(3)
    assert torch.equal(plain(images), merged(images))
