"""Passes without memory against real ones on the CPU."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile

from spt_dist.allocation.bound import densest_plan
from spt_dist.allocation.plan import Plan
from spt_dist.allocation.request import AllocationRequest
from spt_dist.evaluation.rehearsal import Rehearsal
from spt_dist.models.classifier import create_model
from spt_dist.models.matrices import take_inventory
from spt_dist.sensitivity.memory import count_saved_bytes
from spt_dist.sensitivity.modes import scoring_mode
from spt_dist.sensitivity.scoring import PassOptions, ScoringPass
from spt_dist.tuning.inject import inject, trainable_parameters
from spt_dist.tuning.methods import make_plan
from tests.test_zoo import VIT, ZOO
from tests.tuning.kept_for_tests import kept_storages

KINDS = ZOO | {"plain": ("vit_tiny_patch16_224", VIT), "beit": ("beit_base_patch16_224", VIT | {"depth": 2})}
# Wide enough for activations to stand out beside what has the size of one number a token.
WIDE: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}


def make_pair(name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, nn.Module, tuple[int, int, int]]:
    """The same model with weights and without, in training mode, and the shape of its images."""
    size = kwargs.get("img_size", 64)
    models = [create_model(name, 5, kwargs, torch.device(device)).train() for device in ("cpu", "meta")]
    return models[0], models[1], (3, size, size)


def make_forward(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    targets = torch.zeros(len(images), dtype=torch.int64)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype) if dtype is not None else nullcontext():
            outputs = model(images)
        return F.cross_entropy(outputs.float(), targets)

    return forward


def kept_by(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes that a real forward pass keeps, without parameters, buffers and images."""
    kept = kept_storages(make_forward(model, images, dtype))
    for tensor in (*model.parameters(), *model.buffers(), images):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_of(step: Callable[[], object]) -> int:
    """The most bytes that torch's allocator has given out at a time, beside those of before."""
    with profile(profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def plans(model: nn.Module) -> dict[str, Plan]:
    """Plans that train the head alone, matrices, matrices and single weights, and everything."""
    inventory = take_inventory(model)
    return {
        "linear": make_plan("linear", model),
        "modules": densest_plan(AllocationRequest(tau=9, rank=2, unstructured=False), inventory),
        "adapters": densest_plan(AllocationRequest(tau=9, rank=2, structured="adapter"), inventory),
        "single": densest_plan(AllocationRequest(tau=9, structured=None), inventory),
        "full": make_plan("full", model),
    }


@pytest.mark.parametrize("method", ["linear", "modules", "adapters", "single", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_bytes_are_those_of_a_real_pass(kind: str, method: str) -> None:
    real, empty, shape = make_pair(*KINDS[kind])
    plan = plans(empty)[method]
    # Relative position tables that are trained keep torch's CPU from its fused attention, and only that.
    if kind == "windows" and method in ("adapters", "single", "full"):
        plan.vectors = [name for name in plan.vectors if "relative_position" not in name]
        plan.parameters = [name for name in plan.parameters if "relative_position" not in name]
    wanted = kept_by(inject(real, plan).train(), torch.randn(4, *shape))
    found = Rehearsal(empty, plan).train(shape, 4).kept
    assert found == pytest.approx(wanted, rel=0.02, abs=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_kept_bytes_with_autocast_and_checkpointing(checkpointing: bool, dtype: torch.dtype | None) -> None:
    real, empty, shape = make_pair("vit_tiny_patch16_224", WIDE)
    plan = plans(empty)["modules"]
    for model in (real, empty):
        model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    wanted = kept_by(inject(real, plan).train(), torch.randn(4, *shape), dtype)
    assert Rehearsal(empty, plan).train(shape, 4, autocast=dtype).kept == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("method", ["linear", "modules", "single", "full"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_peak_is_that_of_a_real_pass(checkpointing: bool, method: str) -> None:
    real, empty, shape = make_pair("vit_tiny_patch16_224", WIDE)
    plan = plans(empty)[method]
    for model in (real, empty):
        model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    forward = make_forward(inject(real, plan).train(), torch.randn(8, *shape))
    forward().backward()
    real.zero_grad()
    found, wanted = Rehearsal(empty, plan).train(shape, 8).peak, peak_of(lambda: forward().backward())
    # Without memory autograd never adds one gradient to another in place: at most one more of fc1's outputs.
    assert 0.99 * wanted < found < 1.01 * wanted + 8 * 65 * 4 * 96 * 4


def test_gradients_are_told_apart() -> None:
    _, empty, shape = make_pair("vit_tiny_patch16_224", WIDE)
    rehearsal = Rehearsal(empty, make_plan("full", empty))
    gradients = 4 * sum(parameter.numel() for _, parameter in trainable_parameters(empty))
    # With one small image the end of the backward pass takes most, when all gradients are there.
    few = rehearsal.train(shape, 1)
    assert 0.5 * gradients < few.gradients <= gradients
    # With many it is its begin.
    assert rehearsal.train(shape, 64).gradients < 0.1 * gradients
    second = rehearsal.train(shape, 64, accumulates=True)
    assert second.gradients == gradients
    assert second.kept == rehearsal.train(shape, 64).kept
    assert second.activations == pytest.approx(rehearsal.train(shape, 64).activations, rel=0.02)
    sent = rehearsal.train(shape, 1, keeps_gradients=False)
    assert sent.gradients == 0
    assert few.activations <= sent.peak < few.peak
    assert all(parameter.grad is None for parameter in empty.parameters())


def test_a_module_in_two_places_is_rehearsed_once() -> None:
    _, empty, shape = make_pair("vit_tiny_patch16_224", WIDE)
    wanted = Rehearsal(empty, make_plan("lora", empty)).train(shape, 2)
    _, empty, _ = make_pair("vit_tiny_patch16_224", WIDE)
    empty.add_module("again", empty.get_submodule("blocks.0.norm1"))
    assert Rehearsal(empty, make_plan("lora", empty)).train(shape, 2) == wanted


def test_memory_grows_with_the_samples() -> None:
    _, empty, shape = make_pair("vit_tiny_patch16_224", WIDE)
    rehearsal = Rehearsal(empty, plans(empty)["modules"])
    one, two, nine = (rehearsal.train(shape, count).kept for count in (1, 2, 9))
    assert nine - one == pytest.approx(8 * (two - one), rel=1e-3)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("kind", ["plain", "windows", "convolutions"])
def test_scoring_keeps_what_a_real_pass_keeps(kind: str, per_sample: bool) -> None:
    real, empty, shape = make_pair(*KINDS[kind])
    options = PassOptions(per_sample, None, lockstep=False, shard_sums=False)
    device = torch.device("cpu")
    with scoring_mode(real, False):
        scoring = ScoringPass(real, take_inventory(real), F.cross_entropy, options, device)
        with scoring.attached():
            _, wanted = (
                count_saved_bytes(scoring, torch.randn(size, *shape), torch.zeros(size, dtype=torch.int64))
                for size in (1, 6)
            )
    images = 4 * 6 * 3 * shape[1] * shape[2]
    found = Rehearsal(empty).score(shape, 6, per_sample=per_sample)
    # The first layer's input is the images themselves. Copies of tokens and tables are alive, if not for autograd.
    assert wanted - images <= found.kept < 1.05 * (wanted - images)
    assert found.num_samples == 6
    assert found.peak > found.kept


def test_scoring_takes_as_many_samples_as_the_limit_says() -> None:
    _, empty, shape = make_pair("vit_tiny_patch16_224", WIDE)
    rehearsal = Rehearsal(empty)
    one = rehearsal.score(shape, 1).kept
    assert rehearsal.score(shape, 8, memory_limit=5 * one + 1).num_samples == 5
    assert rehearsal.score(shape, 3, memory_limit=5 * one).num_samples == 3
    assert rehearsal.score(shape, 8, memory_limit=1).num_samples == 1


def test_scoring_extends_to_many_samples() -> None:
    """Rules square sample by sample, so passes are rehearsed with few."""
    _, empty, shape = make_pair("vit_tiny_patch16_224", WIDE)
    two, three, ten = (Rehearsal(empty).score(shape, count) for count in (2, 3, 10))
    assert ten.peak == three.peak + 7 * (three.peak - two.peak)
    assert ten.kept == pytest.approx(10 / 3 * three.kept, rel=0.01)
