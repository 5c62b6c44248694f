"""SPT-LoRA and SPT-Adapter against their definition (methods.md, section 15.3) in plain tensor algebra.

Shape suffixes: B samples, T tokens, D width, I in_features, O out_features, R rank.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from spt_dist import Plan, inject, trainable_parameters
from spt_dist.allocation.kinds import RELEASED_MODULES, ModuleOptions
from spt_dist.tuning.adapter import Adapter
from spt_dist.tuning.layers import TunedLinear
from spt_dist.tuning.lora import LowRank
from spt_dist.tuning.prompts import Prompts
from spt_dist.tuning.structured import ModuleSpec
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.plans_for_tests import disturb

D, HEADS = 24, 2
SHAPES = {
    **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.proj"), (D, D)),
    "mlp.fc1": (4 * D, D),
    "mlp.fc2": (D, 4 * D),
}
PLAIN = ModuleOptions()
Params = dict[str, Tensor]


def plan_block(kind: str, operations: tuple[str, ...], modules: ModuleOptions = PLAIN, rank: int = 3) -> Plan:
    """Modules on some operations of the first block."""
    names = {f"blocks.0.{operation}.weight": SHAPES[operation] for operation in operations}
    return Plan(matrices=dict.fromkeys(names, kind), shapes=dict(names), rank=rank, modules=modules, backbone_size=1)


def mixed_plan(kind: str, modules: ModuleOptions) -> Plan:
    """Of one fused projection a module, single weights and a frozen part; and biases under modules."""
    plan = plan_block(kind, ("attn.q", "mlp.fc2"), modules)
    plan.vectors += ["blocks.0.attn.q.bias", "blocks.0.mlp.fc2.bias"]
    plan.sparse = {
        "blocks.0.attn.k.weight": torch.tensor([0, 30, 575]),
        "blocks.0.attn.v.bias": torch.tensor([3]),
        "blocks.0.attn.proj.weight": torch.arange(0, 576, 7),
    }
    plan.shapes |= {name: (D,) for name in (*plan.vectors, "blocks.0.attn.v.bias")}
    plan.shapes |= {f"blocks.0.attn.{letter}.weight": (D, D) for letter in ("k", "proj")}
    return plan


def tuned_block(plan: Plan) -> nn.Module:
    """The first block of the tuned model in float64, every trained value moved."""
    tuned = inject(make_vit(), plan)
    disturb(tuned)
    return tuned.double().get_submodule("blocks.0")


def params_of(block: nn.Module) -> Params:
    """Copies of its parameters; gradients can be asked for those that are trained."""
    return {
        name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
        for name, parameter in block.named_parameters()
    }


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def added(tensor: Tensor, plan: Plan, params: Params, parts: tuple[str, ...], kind: str, holder: str) -> Tensor:
    """A weight or bias, possibly fused, with the values that single weights and vectors add to it."""
    places = []
    rows = len(tensor) // len(parts)
    for chosen in (plan.vectors, plan.sparse):
        for name in chosen:
            for number, part in enumerate(parts):
                if name == f"blocks.0.{part}.{kind}":
                    size = tensor[:rows].numel()
                    mine = plan.sparse.get(name, torch.arange(size)).tolist()
                    places += [number * size + place for place in mine]
    if not places:
        return tensor
    flat = [*tensor.flatten().unbind()]
    for place, value in zip(places, params[holder].unbind(), strict=True):
        flat[place] = flat[place] + value
    return torch.stack(flat).view(tensor.shape)


def operation(x: Tensor, op: str, plan: Plan, params: Params, row: int = 0) -> Tensor:
    """One of the six operations of a block, section 15.3; ``row``: place in the fused projection."""
    layer, parts = ("attn.qkv", ("attn.q", "attn.k", "attn.v")) if op in ("attn.q", "attn.k", "attn.v") else (op, (op,))
    out = SHAPES[op][0]
    weight_OI = added(params[f"{layer}.weight"], plan, params, parts, "weight", f"{layer}.sparse.values")
    bias_O = added(params[f"{layer}.bias"], plan, params, parts, "bias", f"{layer}.bias_delta.values")
    z = x @ weight_OI[row * out : (row + 1) * out].T + bias_O[row * out : (row + 1) * out]
    kind = plan.matrices.get(f"blocks.0.{op}.weight")
    if kind is None:
        return z
    prefix = f"{layer}.structured.{op[-1] if len(parts) == 3 else 'whole'}."
    down_RI, up_OR = params[prefix + "down"], params[prefix + "up"]
    if kind == "lora":
        return z + x @ down_RI.T @ up_OR.T
    read = x if op == "attn.proj" and plan.modules.parallel == ("proj",) else z
    return z + gelu(read @ down_RI.T + params[prefix + "down_bias"]) @ up_OR.T + params[prefix + "up_bias"]


def reference(x_BTD: Tensor, plan: Plan, params: Params) -> Tensor:
    """A ViT block with modules, in eval mode."""
    batch, tokens, _ = x_BTD.shape
    normed = norm(x_BTD, params["norm1.weight"], params["norm1.bias"])
    q, k, v = (
        operation(normed, f"attn.{letter}", plan, params, row).view(batch, tokens, HEADS, D // HEADS).transpose(1, 2)
        for row, letter in enumerate("qkv")
    )
    attention = torch.exp(q @ k.mT / math.sqrt(D // HEADS))
    o = (attention / attention.sum(-1, keepdim=True)) @ v
    a = x_BTD + operation(o.transpose(1, 2).reshape(batch, tokens, D), "attn.proj", plan, params)
    hidden = gelu(operation(norm(a, params["norm2.weight"], params["norm2.bias"]), "mlp.fc1", plan, params))
    return a + operation(hidden, "mlp.fc2", plan, params)


PLANS = {
    "all": lambda kind, modules: plan_block(kind, tuple(SHAPES), modules),
    "mixed": mixed_plan,
    "alone": lambda kind, modules: plan_block(kind, ("attn.proj",), modules),
}


@pytest.mark.parametrize("modules", [PLAIN, RELEASED_MODULES], ids=["default", "released"])
@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize("which", PLANS)
def test_outputs_and_gradients_are_those_of_the_definition(which: str, kind: str, modules: ModuleOptions) -> None:
    plan = PLANS[which](kind, modules)
    block = tuned_block(plan)
    params = params_of(block)
    x = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    outputs, wanted = block(x), reference(x, plan, params)
    assert torch.allclose(outputs, wanted, rtol=1e-11, atol=1e-11)

    direction = torch.randn_like(outputs)
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((outputs * direction).sum(), [x, *trained.values()])
    right = torch.autograd.grad((wanted * direction).sum(), [x, *(params[name] for name in trained)])
    for name, mine, other in zip(["x", *trained], found, right, strict=True):
        assert other.abs().max() > 0, name
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axes", [(), (3,), (2, 3, 4), (0,), (0, 5), (5, 0)])
@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_layers_take_any_leading_axes(kind: str, axes: tuple[int, ...], training: bool) -> None:
    """None, several, and those of empty batches."""
    block = tuned_block(plan_block(kind, tuple(SHAPES), ModuleOptions(drop_path=1e-12))).train(training)
    for name in ("attn.qkv", "attn.proj", "mlp.fc2"):
        layer = block.get_submodule(name)
        x = torch.randn(*axes, layer.in_features, dtype=torch.float64, requires_grad=True)
        outputs = layer(x)
        assert outputs.shape == (*axes, layer.out_features)
        outputs.sum().backward()
        assert x.grad.shape == x.shape
        for row, mine in zip(x.reshape(-1, x.shape[-1]), outputs.reshape(-1, outputs.shape[-1]), strict=True):
            assert torch.allclose(mine, layer(row), rtol=1e-10)


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    block = tuned_block(plan_block(kind, ("attn.v", "attn.proj", "mlp.fc2"), RELEASED_MODULES, rank=1))
    x = torch.randn(2, 3, D, dtype=torch.float64)
    block(x).sin().sum().backward()
    for name, parameter in block.named_parameters():
        if parameter.requires_grad:
            entry, step = int(parameter.grad.abs().argmax()), 1e-6
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[entry] += sign * step
                    values.append(float(block(x).sin().sum()))
                    parameter.view(-1)[entry] -= sign * step
            wanted = (values[0] - values[1]) / (2 * step)
            assert float(parameter.grad.view(-1)[entry]) == pytest.approx(wanted, rel=1e-5), name


def test_released_adapters_stand_beside_proj_and_the_default_ones_behind_it() -> None:
    """The two differ by what proj's adapter reads, and by nothing else."""
    for operations, equal in ((("attn.proj",), False), (("attn.q", "attn.v", "mlp.fc1", "mlp.fc2"), True)):
        x = torch.randn(2, 5, D, dtype=torch.float64)
        outputs = []
        for modules in (RELEASED_MODULES, replace(RELEASED_MODULES, parallel=())):
            torch.manual_seed(0)
            outputs.append(tuned_block(plan_block("adapter", operations, modules))(x))
        assert torch.equal(*outputs) == equal


def identity_layer(kind: str, operations: tuple[str, ...], modules: ModuleOptions, layer: str) -> TunedLinear:
    """A layer in training mode whose modules show what they read: ``up down`` is the identity."""
    tuned = inject(make_vit(), plan_block(kind, operations, modules, rank=D)).double().train()
    found = tuned.get_submodule(f"blocks.0.{layer}")
    assert isinstance(found, TunedLinear)
    for module in found.structured.values():
        for name, parameter in module.named_parameters():
            parameter.data = (
                torch.eye(D, dtype=torch.float64) if name in ("up", "down") else torch.zeros_like(parameter)
            )
    return found


def updates_of(layer: TunedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer's modules add to its plain output, and the latter."""
    z = x @ layer.weight.T + layer.bias
    return (layer(x) - z).detach(), z.detach()


def check_dropped(updates: Tensor, whole: Tensor, share: float) -> Tensor:
    """Every entry is zero or that of ``whole``, zero for about that ``share``; returns which are not."""
    kept = updates.abs() > 1e-9
    assert torch.allclose(updates[kept], whole[kept], rtol=1e-9, atol=1e-9)
    assert float((~kept).double().mean()) == pytest.approx(share, abs=0.02)
    return kept


NO_DROP_PATH = replace(RELEASED_MODULES, drop_path=0.0)
QKV = ("attn.q", "attn.k", "attn.v")


def test_low_rank_modules_of_q_k_and_v_share_one_mask() -> None:
    layer = identity_layer("lora", QKV, NO_DROP_PATH, "attn.qkv")
    x = torch.randn(50, 8, D, dtype=torch.float64)
    first, second = (updates_of(layer, x)[0].chunk(3, dim=-1) for _ in range(2))
    masks = [check_dropped(part, x / 0.9, 0.1) for part in first]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], check_dropped(second[0], x / 0.9, 0.1)), "drawn anew for every forward"
    layer.eval()
    assert torch.allclose(updates_of(layer, x)[0], x.repeat(1, 1, 3), rtol=1e-9, atol=1e-9)


def test_adapters_drop_entries_of_what_they_read() -> None:
    layer = identity_layer("adapter", QKV, NO_DROP_PATH, "attn.qkv")
    x = torch.randn(50, 8, D, dtype=torch.float64)
    updates, z = updates_of(layer, x)
    check_dropped(updates, gelu(z / 0.9), 0.1)


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_what_stands_beside_proj_sees_no_dropout(kind: str) -> None:
    x = torch.randn(50, 8, D, dtype=torch.float64)
    layer = identity_layer(kind, ("attn.proj",), NO_DROP_PATH, "attn.proj")
    updates, z = updates_of(layer, x)
    assert torch.allclose(updates, x if kind == "lora" else gelu(x), rtol=1e-9, atol=1e-9)
    # Without the exception for proj it has dropout as well, and the adapter is behind it.
    layer = identity_layer(kind, ("attn.proj",), replace(NO_DROP_PATH, parallel=()), "attn.proj")
    updates, z = updates_of(layer, x)
    check_dropped(updates, x / 0.9 if kind == "lora" else gelu(z / 0.9), 0.1)


@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize("rate", [0.1, 0.75])
def test_drop_path_leaves_out_whole_samples(kind: str, rate: float) -> None:
    """And scales the others up by 1 / (1 - rate); each module draws its own samples."""
    layer = identity_layer(kind, QKV, ModuleOptions(drop_path=rate), "attn.qkv")
    x = torch.randn(3000, 2, D, dtype=torch.float64)
    updates, z = updates_of(layer, x)
    whole = (x.repeat(1, 1, 3) if kind == "lora" else gelu(z)) / (1 - rate)
    kept = check_dropped(updates, whole, rate).view(3000, 2, 3, D)
    of_samples = kept.any(dim=3).any(dim=1)
    assert torch.equal(of_samples[:, None, :, None].expand_as(kept), kept), "no sample is dropped in part"
    assert not torch.equal(of_samples[:, 0], of_samples[:, 1])
    layer.eval()
    assert torch.allclose(updates_of(layer, x)[0], whole * (1 - rate), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("modules", [PLAIN, replace(RELEASED_MODULES, init="zero")], ids=["default", "released"])
@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize("training", [False, True])
def test_zero_init_is_the_identity_bit_for_bit(kind: str, modules: ModuleOptions, training: bool) -> None:
    images, _ = make_samples(3)
    wanted = make_vit()(images)
    tuned = inject(make_vit(), plan_block(kind, tuple(SHAPES), modules)).train(training)
    assert torch.equal(tuned(images), wanted)


@pytest.mark.parametrize("module_class", [LowRank, Adapter])
def test_normal_init_draws_both_matrices_with_the_released_deviation(module_class: type[LowRank | Adapter]) -> None:
    """``trunc_normal_`` cuts at -2 and 2, a hundred deviations out, so nothing is cut off, as in the published code."""
    module = module_class(ModuleSpec(768, 768, 64, init="normal"))
    for matrix in (module.down.detach(), module.up.detach()):
        assert float(matrix.mean()) == pytest.approx(0, abs=3e-4)
        assert float(matrix.std()) == pytest.approx(0.02, rel=0.02)
        assert 0.07 < float(matrix.abs().max()) < 0.12
        beyond = float((matrix.abs() > 0.04).double().mean())
        assert beyond == pytest.approx(math.erfc(2 / math.sqrt(2)), rel=0.1)
    for name, parameter in module.named_parameters():
        assert name in ("up", "down") or not parameter.any(), name


@pytest.mark.parametrize("module_class", [LowRank, Adapter])
def test_zero_init_draws_down_and_leaves_up_at_zero(module_class: type[LowRank | Adapter]) -> None:
    module = module_class(ModuleSpec(768, 768, 64))
    # Kaiming with a = sqrt(5) is uniform within 1 / sqrt(fan_in).
    bound = 1 / math.sqrt(768)
    assert 0.999 * bound < float(module.down.detach().abs().max()) <= bound
    assert float(module.down.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    for name, parameter in module.named_parameters():
        assert name == "down" or not parameter.any(), name


@pytest.mark.parametrize("init", ["zero", "normal"])
def test_the_seed_decides_all_draws(init: str) -> None:
    spec = ModuleSpec(16, 24, 3, init=init)
    makers = (lambda: LowRank(spec), lambda: Adapter(spec), lambda: Prompts(3, 24, init))
    for make in makers:
        states = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            states.append(torch.cat([parameter.detach().flatten() for parameter in make().parameters()]))
        assert torch.equal(states[0], states[1])
        assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_the_first_step_moves_up_and_not_yet_down(kind: str) -> None:
    images, labels = make_samples(4)
    tuned = inject(make_vit(), plan_block(kind, tuple(SHAPES)))
    nn.functional.cross_entropy(tuned(images), labels).backward()
    checked = set()
    for name, parameter in trainable_parameters(tuned):
        own = name.rpartition(".")[2]
        # k's rows move all keys alike, to which attention is blind.
        if name != "blocks.0.attn.qkv.structured.k.up_bias":
            assert (float(parameter.grad.abs().max()) > 1e-8) == own.startswith("up"), name
        checked.add(own)
    assert checked == ({"up", "down"} if kind == "lora" else {"up", "down", "up_bias", "down_bias"})
