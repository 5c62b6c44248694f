"""Adapter-k against a block written out.

Shape suffixes: B samples, T tokens, D width.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import UserError, inject, trainable_parameters
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.methods.models_for_tests import Held, through_blocks
from tests.tuning.plans_for_tests import disturb

IMAGES, LABELS = make_samples(4)


def gelu(x: Tensor) -> Tensor:
    """GELU from its definition."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def adapted(block: nn.Module, x_BTD: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """A block's output with an adapter behind the MLP, within the residual branch."""
    after_BTD = x_BTD + block.attn(block.norm1(x_BTD))
    y_BTD = block.mlp(block.norm2(after_BTD))
    hidden_BTR = gelu(y_BTD @ tensors["down"].T + tensors["down_bias"])
    return after_BTD + y_BTD + hidden_BTR @ tensors["up"].T + tensors["up_bias"]


def adapters_of(model: nn.Module) -> list[dict[str, Tensor]]:
    """The trained tensors of each block, by their own names."""
    found: list[dict[str, Tensor]] = [{} for _ in model.blocks]
    for name, parameter in trainable_parameters(model):
        if name.startswith("blocks."):
            found[int(name.split(".")[1])][name.rpartition(".")[2]] = parameter.detach().clone()
    return found


def test_outputs_and_gradients_are_those_of_a_block_written_out() -> None:
    tuned = inject(make_vit(), make_plan("adapter", make_vit(), rank=3)).double()
    disturb(tuned)
    leaves = adapters_of(tuned)
    for tensors in leaves:
        assert {name: tuple(value.shape) for name, value in tensors.items()} == {
            "down": (3, 24),
            "down_bias": (3,),
            "up": (24, 3),
            "up_bias": (24,),
        }
        for tensor in tensors.values():
            tensor.requires_grad_()
    # The head is trained too.
    plain = make_vit().double()
    plain.head.load_state_dict(tuned.head.state_dict())
    wanted = through_blocks(plain, IMAGES.double(), lambda number, block, x: adapted(block, x, leaves[number]))
    outputs = tuned(IMAGES.double())
    assert torch.allclose(outputs, wanted, rtol=1e-12, atol=1e-12)
    F.cross_entropy(outputs, LABELS).backward()
    F.cross_entropy(wanted, LABELS).backward()
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(tuned)}
    for number, tensors in enumerate(leaves):
        for name, tensor in tensors.items():
            found = next(
                grad
                for full, grad in gradients.items()
                if full.startswith(f"blocks.{number}.mlp.fc2") and full.endswith(f".{name}")
            )
            assert tensor.grad.abs().max() > 0
            assert torch.allclose(found, tensor.grad, rtol=1e-9, atol=1e-12), name


def test_the_start_is_the_identity_and_can_be_left() -> None:
    tuned = inject(make_vit(), make_plan("adapter", make_vit()))
    assert torch.equal(tuned(IMAGES), make_vit()(IMAGES))
    F.cross_entropy(tuned(IMAGES), LABELS).backward()
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(tuned) if name.endswith(".up")}
    # With all four at zero only the last bias would ever move.
    assert len(gradients) == 2
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2 * (2 * 24 * 8 + 8 + 24)),
        ({"rank": 3}, 2 * (2 * 24 * 3 + 3 + 24)),
        ({"rank": 3, "targets": ["proj", "fc1"]}, 2 * (2 * 24 * 3 + 3 + 24 + 2 * 96 * 3 + 3 + 96)),
    ],
)
def test_counts(options: dict[str, object], count: int) -> None:
    for model, head in ((make_vit(), 250), (Held(), 7 * 25)):
        plan = make_plan("adapter", model, **options)
        assert plan.method == "adapter"
        assert plan.num_trainable == count
        tuned = inject(model, plan)
        assert sum(parameter.numel() for _, parameter in trainable_parameters(tuned)) == count + head


def test_names_within_another_model() -> None:
    plan = make_plan("adapter", Held())
    assert list(plan.matrices) == ["backbone.blocks.0.mlp.fc2.weight", "backbone.blocks.1.mlp.fc2.weight"]
    assert sorted(plan.head) == ["decode_head.bias", "decode_head.weight"]


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="'mlp' is no operation of this model; it has fc1, fc2, k, proj, q, v"):
        make_plan("adapter", make_vit(), targets=["mlp"])
    with pytest.raises(UserError, match=r"method\.rank=0: has to be at least 1"):
        make_plan("adapter", make_vit(), rank=0)
