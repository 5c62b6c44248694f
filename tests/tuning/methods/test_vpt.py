"""VPT-deep against a forward written out, with the prompts where VPT has them: between class token and patches.

Shape suffixes: B samples, T tokens, P prompts, D width.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import UserError, inject, trainable_parameters
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.methods.models_for_tests import Held, through_blocks
from tests.tuning.plans_for_tests import disturb, make_model

IMAGES, LABELS = make_samples(4)


def prompted(block: nn.Module, x_BTD: Tensor, prompts_PD: Tensor) -> Tensor:
    """A block's output for its tokens and prompts of its own, without what becomes of the prompts."""
    samples = []
    for x_TD in x_BTD:
        whole = torch.cat([x_TD[:1], prompts_PD, x_TD[1:]])
        outputs = block(whole[None])[0]
        samples.append(torch.cat([outputs[:1], outputs[1 + len(prompts_PD) :]]))
    return torch.stack(samples)


def test_outputs_and_gradients_are_those_of_vpt() -> None:
    tuned = inject(make_vit(), make_plan("vpt", make_vit(), num_prompts=3)).double()
    disturb(tuned)
    names = [f"blocks.{number}.prompts.tokens" for number in range(2)]
    leaves = [tuned.get_parameter(name).detach().clone().requires_grad_() for name in names]
    plain = make_vit().double()
    plain.head.load_state_dict(tuned.head.state_dict())
    wanted = through_blocks(plain, IMAGES.double(), lambda number, block, x: prompted(block, x, leaves[number]))
    outputs = tuned(IMAGES.double())
    assert torch.allclose(outputs, wanted, rtol=1e-12, atol=1e-12)
    F.cross_entropy(outputs, LABELS).backward()
    F.cross_entropy(wanted, LABELS).backward()
    for name, leaf in zip(names, leaves, strict=True):
        assert leaf.grad.abs().max() > 0
        assert torch.allclose(tuned.get_parameter(name).grad, leaf.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("options", "count"), [({}, 2 * 10 * 24), ({"num_prompts": 3, "dropout": 0.1}, 2 * 3 * 24)])
def test_counts(options: dict[str, object], count: int) -> None:
    for model, head in ((make_vit(), 250), (Held(), 7 * 25)):
        plan = make_plan("vpt", model, **options)
        assert plan.method == "vpt"
        assert plan.num_trainable == count
        tuned = inject(model, plan)
        assert sum(parameter.numel() for _, parameter in trainable_parameters(tuned)) == count + head


def test_names_within_another_model() -> None:
    held = Held()
    plan = make_plan("vpt", held)
    assert list(plan.matrices) == ["backbone.blocks.0", "backbone.blocks.1"]
    assert sorted(plan.head) == ["decode_head.bias", "decode_head.weight"]
    tuned = inject(held, plan)
    wanted = through_blocks(
        Held().backbone,
        IMAGES,
        lambda number, block, x: prompted(block, x, tuned.get_parameter(f"backbone.blocks.{number}.prompts.tokens")),
    )
    assert torch.allclose(tuned(IMAGES), tuned.decode_head(wanted), rtol=1e-5, atol=1e-6)


def test_dropout_is_that_of_the_plan() -> None:
    tuned = inject(make_vit(), make_plan("vpt", make_vit(), dropout=0.25))
    assert {tuned.get_submodule(f"blocks.{number}.prompts.dropout").p for number in range(2)} == {0.25}


def test_what_takes_no_prompts_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.num_prompts=0: has to be at least 1"):
        make_plan("vpt", make_vit(), num_prompts=0)
    with pytest.raises(UserError, match=r"dropout=1\.5: has to be a number from 0 to below 1"):
        make_plan("vpt", make_vit(), dropout=1.5)
    with pytest.raises(UserError, match=r"prompts for layers\.0\.blocks\.0, which is a SwinTransformerBlock"):
        make_plan("vpt", make_model("windows"))
    with pytest.raises(UserError, match=r"method\.type='vpt': this Sequential has no blocks to put prompts into"):
        make_plan("vpt", nn.Sequential(nn.Linear(3, 4)))
