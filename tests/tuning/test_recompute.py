"""Inputs that are computed again in the backward pass: same numbers as without, and fewer bytes kept."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from spt_dist import Plan, inject, merge, trainable_parameters
from spt_dist.allocation.kinds import RELEASED_MODULES, ModuleOptions
from spt_dist.tuning.layers import TunedLinear
from spt_dist.tuning.mlp import TunedMlp, restore_plain
from spt_dist.tuning.recompute import Activated, project
from spt_dist.tuning.sparse import SparseDelta
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.kept_for_tests import kept_storages
from tests.tuning.plans_for_tests import disturb

WIDTH, HIDDEN, TOKENS, BATCH = 24, 96, 5, 6
IMAGES, LABELS = make_samples(BATCH)
# Of the second block few columns, of the third all.
FEW = torch.tensor([row * HIDDEN + column for row in range(0, 24, 3) for column in (0, 40, 41)])
STREWN = torch.arange(0, WIDTH * HIDDEN, 23)


def make_plan(modules: ModuleOptions | None = None) -> Plan:
    """On fc2 of four blocks LoRA, a block of weights, strewn weights, nothing; and LoRA before fc1's activation."""
    matrices = ["blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc1.weight", "blocks.3.mlp.fc1.weight"]
    sparse = {"blocks.1.mlp.fc2.weight": FEW, "blocks.2.mlp.fc2.weight": STREWN}
    vectors = ["blocks.0.mlp.fc2.bias", "blocks.1.mlp.fc2.bias"]
    shapes = {name: (WIDTH, HIDDEN) if ".fc2." in name else (HIDDEN, WIDTH) for name in (*matrices, *sparse)}
    return Plan(
        matrices=dict.fromkeys(matrices, "lora"),
        sparse=dict(sparse),
        vectors=vectors,
        # As with every ViT: the first block's tokens have gradients, so its GELU keeps what it reads.
        parameters=["cls_token"],
        shapes=shapes | dict.fromkeys(vectors, (WIDTH,)) | {"cls_token": (1, 1, WIDTH)},
        rank=2,
        modules=modules or ModuleOptions(),
        backbone_size=1,
    )


def both(modules: ModuleOptions | None = None, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """A tuned model, its values moved, and a copy whose MLPs are timm's own."""
    tuned = inject(make_vit(depth=4, **kwargs), make_plan(modules))
    disturb(tuned)
    tuned.get_submodule("blocks.2.mlp.fc2").sparse.as_block = False
    plain = copy.deepcopy(tuned)
    restore_plain(plain)
    assert [type(block.mlp) for block in plain.blocks] == [Mlp] * 4
    return tuned, plain


def mlp_types(model: nn.Module) -> list[type]:
    return [type(block.mlp) for block in model.blocks]


def gradients(model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and the gradient of every trained parameter."""
    torch.manual_seed(3)
    outputs = forward(model)
    F.cross_entropy(outputs.float(), LABELS).backward()
    return outputs.detach(), {name: parameter.grad for name, parameter in trainable_parameters(model)}


def check_equal(tuned: nn.Module, plain: nn.Module, forward: Callable[[nn.Module], Tensor], tolerance: float) -> None:
    outputs, found = gradients(tuned, forward)
    wanted_outputs, wanted = gradients(plain, forward)
    assert torch.equal(outputs, wanted_outputs)
    for name, right in wanted.items():
        assert right.abs().max() > 0, name
        assert torch.allclose(found[name], right, rtol=tolerance, atol=tolerance * float(right.abs().max())), name


def run(model: nn.Module) -> Tensor:
    return model(IMAGES)


def run_in_bfloat16(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(IMAGES)


@pytest.mark.parametrize("forward", [run, run_in_bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_plain_mlps(forward: Callable[[nn.Module], Tensor], training: bool) -> None:
    tuned, plain = both()
    assert mlp_types(tuned) == [TunedMlp, TunedMlp, TunedMlp, Mlp]
    # Both round to bfloat16 at the same places.
    check_equal(tuned.train(training), plain.train(training), forward, 1e-6 if forward is run else 1e-2)


@pytest.mark.parametrize("forward", [run, run_in_bfloat16])
@pytest.mark.parametrize("modules", [ModuleOptions(dropout=0.3), RELEASED_MODULES])
def test_modules_with_dropout_read_what_is_left(forward: Callable[[nn.Module], Tensor], modules: ModuleOptions) -> None:
    """Single weights beside them read all of it."""
    tuned, plain = both(modules)
    check_equal(tuned.train(), plain.train(), forward, 1e-6 if forward is run else 1e-2)


@pytest.mark.parametrize("kwargs", [{"proj_drop_rate": 0.3}, {"scale_mlp_norm": True}])
@pytest.mark.parametrize("training", [False, True])
def test_what_dropout_or_a_norm_has_changed_is_not_computed_again(kwargs: dict[str, object], training: bool) -> None:
    tuned, plain = both(**kwargs)
    assert TunedMlp in mlp_types(tuned)
    check_equal(tuned.train(training), plain.train(training), run, 1e-6)


def test_only_mlps_with_gelu_are_changed() -> None:
    for act_layer in (nn.ReLU, nn.SiLU, nn.GELU, partial(nn.GELU, approximate="tanh")):
        tuned, plain = both(act_layer=act_layer)
        assert (TunedMlp in mlp_types(tuned)) == (act_layer not in (nn.ReLU, nn.SiLU))
        check_equal(tuned, plain, run, 1e-6)


def test_without_gradients() -> None:
    tuned, plain = both()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = tuned(IMAGES)
            assert torch.equal(outputs, plain(IMAGES))
            assert not outputs.requires_grad
    assert torch.equal(outputs, tuned(IMAGES))


def kept_bytes(model: nn.Module) -> dict[int, int]:
    """Address -> bytes of what a step's forward keeps; tensors that are there anyway left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), IMAGES]}
    return {address: size for address, size in kept_storages(lambda: model(IMAGES)).items() if address not in own}


def test_just_the_inputs_of_fc2_are_no_longer_kept() -> None:
    """All of them for LoRA, the chosen columns for single weights."""
    tuned, plain = both()
    columns = HIDDEN + 3 + len(set((STREWN % HIDDEN).tolist()))
    saved = sum(kept_bytes(plain).values()) - sum(kept_bytes(tuned).values())
    assert saved == BATCH * TOKENS * 4 * columns


def test_where_gelu_keeps_nothing_its_input_is_not_kept_instead() -> None:
    """As in a first block with nothing trained before it: few columns are less than all that GELU reads."""
    name = "blocks.0.mlp.fc2.weight"
    plan = Plan(sparse={name: FEW}, shapes={name: (WIDTH, HIDDEN)}, backbone_size=1)
    tuned = inject(make_vit(depth=1), plan)
    disturb(tuned)
    plain = copy.deepcopy(tuned)
    restore_plain(plain)
    assert sum(kept_bytes(tuned).values()) <= sum(kept_bytes(plain).values())
    check_equal(tuned, plain, run, 1e-6)


@pytest.mark.parametrize("forward", [run, run_in_bfloat16])
def test_activation_checkpointing_gives_the_same_gradients(forward: Callable[[nn.Module], Tensor]) -> None:
    tuned, plain = both()
    tuned.train().set_grad_checkpointing()
    check_equal(tuned, plain.train(), forward, 1e-6 if forward is run else 1e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_both_kinds_of_checkpointing(use_reentrant: bool) -> None:
    tuned, plain = both()
    x = torch.randn(BATCH, TOKENS, WIDTH)
    for number in range(3):
        found = []
        for model in (tuned, plain):
            model.zero_grad()
            inputs = x.clone().requires_grad_()
            block = model.blocks[number]
            if model is tuned:
                outputs = torch.utils.checkpoint.checkpoint(block, inputs, use_reentrant=use_reentrant)
            else:
                outputs = block(inputs)
            outputs.cos().sum().backward()
            found.append([inputs.grad, *(p.grad for _, p in trainable_parameters(block))])
        for mine, right in zip(*found, strict=True):
            assert torch.allclose(mine, right, rtol=1e-5, atol=1e-6 * float(right.abs().max()))


def test_copies_pickles_and_merged_models_keep_or_lose_it() -> None:
    tuned, plain = both()
    again = copy.deepcopy(tuned)
    assert mlp_types(again) == mlp_types(tuned)
    check_equal(again, plain, run, 1e-6)
    merged = merge(tuned)
    assert mlp_types(merged) == [Mlp] * 4
    assert torch.allclose(merged(IMAGES), tuned(IMAGES), rtol=1e-4, atol=1e-5)


ACTIVATION = nn.GELU()
AXES = [(), (3,), (2, 3)]


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("known", [True, False])
def test_gradients_of_project(axes: tuple[int, ...], known: bool) -> None:
    """First and second ones, where the input's source is known and where not."""

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        return project(ACTIVATION(hidden), weight, Activated(hidden, ACTIVATION) if known else None)

    inputs = (doubles(*axes, 4), doubles(3, 4))
    assert torch.equal(function(*inputs), ACTIVATION(inputs[0]) @ inputs[1].T)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("as_block", [True, False])
def test_gradients_of_single_weights(axes: tuple[int, ...], known: bool, as_block: bool) -> None:
    """Second ones are refused: not all that they need is kept."""
    layer = TunedLinear(nn.Linear(4, 3).double().requires_grad_(False))
    layer.sparse = SparseDelta(torch.tensor([0, 3, 5, 11]), 4)
    layer.sparse.as_block = as_block

    def function(hidden: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        source = Activated(hidden, ACTIVATION) if known else None
        return functional_call(layer, {"sparse.values": values, "bias": bias}, (ACTIVATION(hidden), source))

    inputs = (doubles(*axes, 4), doubles(4), doubles(3))
    weight = layer.weight.flatten().index_add(0, torch.tensor([0, 3, 5, 11]), inputs[1]).view(3, 4)
    assert torch.allclose(function(*inputs), ACTIVATION(inputs[0]) @ weight.T + inputs[2], rtol=1e-12)
    assert torch.autograd.gradcheck(function, inputs)
    gradient = torch.autograd.grad(function(*inputs).cos().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(g.sum() for g in gradient).backward()
