"""Modules on depthwise and pointwise convolutions, against sums over patches and channels written out in float64."""

import copy
import math
from collections.abc import Callable
from typing import Any

# Must come before peft: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # noqa: F401  # isort: skip

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import (
    ModuleSpec,
    Plan,
    StructuredModule,
    UserError,
    allocate,
    estimate_sensitivity,
    inject,
    merge,
    register_structured,
    trainable_parameters,
)
from spt_dist.allocation.bound import densest_plan
from spt_dist.allocation.costs import AllocationRule, Chooser
from spt_dist.allocation.kinds import KINDS, ModuleOptions, structured_cost
from spt_dist.allocation.request import AllocationRequest
from spt_dist.models.layers import matrix_kind
from spt_dist.models.matrices import take_inventory
from spt_dist.parallel.backbone import partition, shard
from spt_dist.parallel.engines import OptimizerSettings, build_engine
from spt_dist.sections import EngineConfig
from spt_dist.tuning.convolutions import TunedConv2d
from spt_dist.tuning.export.peft import load_peft, save_peft
from spt_dist.tuning.methods import make_plan
from spt_dist.tuning.registry import MODULES
from tests.evaluation.test_rehearsal import kept_by
from tests.ranks import run_ranks
from tests.tuning.plans_for_tests import disturb, make_images, make_model

CPU = torch.device("cpu")
LAYERS: dict[str, Callable[[], nn.Conv2d]] = {
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "two outputs a channel": lambda: nn.Conv2d(3, 6, (3, 2), stride=2, groups=3, bias=False),
    "dilated, around the rim": lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, padding_mode="circular"),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "pointwise, strided": lambda: nn.Conv2d(4, 4, 1, stride=(1, 2)),
}


def tune(conv: nn.Conv2d, kind: str = "lora", options: ModuleOptions | None = None, rank: int = 2) -> nn.Module:
    """The layer in a model of its own, with a module of ``kind`` and a bias that is tuned whole."""
    shapes = {"0.conv.weight": tuple(conv.weight.shape)}
    vectors = [] if conv.bias is None else ["0.conv.bias"]
    shapes |= {name: tuple(conv.bias.shape) for name in vectors if conv.bias is not None}
    plan = Plan({"0.conv.weight": kind}, vectors, shapes=shapes, rank=rank, modules=options or ModuleOptions())
    return inject(nn.Sequential(nn.ModuleDict({"conv": conv})), plan)[0]["conv"]


def make_layer(name: str) -> tuple[nn.Conv2d, Tensor]:
    """A layer in float64 and an input of three images."""
    torch.manual_seed(0)
    conv = LAYERS[name]().double()
    return conv, torch.randn(3, conv.in_channels, 7, 6, dtype=torch.float64)


def by_hand(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution as a sum over the entries of the kernel, each output channel by itself."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    size = conv(x).shape[2:]
    outputs = []
    for channel in range(conv.out_channels):
        first = channel // (conv.out_channels // conv.groups) * weight.shape[1]
        total = torch.zeros(len(x), *size, dtype=x.dtype) + (0 if bias is None else bias[channel])
        for place, value in enumerate(weight[channel].flatten()):
            own, spot = divmod(place, conv.kernel_size[0] * conv.kernel_size[1])
            down, right = (p * d for p, d in zip(divmod(spot, conv.kernel_size[1]), conv.dilation, strict=True))
            rows = slice(down, down + (size[0] - 1) * conv.stride[0] + 1, conv.stride[0])
            columns = slice(right, right + (size[1] - 1) * conv.stride[1] + 1, conv.stride[1])
            total = total + value * padded[:, first + own, rows, columns]
        outputs.append(total)
    return torch.stack(outputs, dim=1)


def values_of(tuned: nn.Module) -> dict[str, Tensor]:
    """The trained values by the last two parts of their names."""
    return {".".join(name.split(".")[-2:]): value for name, value in trainable_parameters(tuned)}


@pytest.mark.parametrize("name", LAYERS)
def test_low_rank_updates_are_those_of_the_flattened_weight(name: str) -> None:
    """Outputs, gradients and the merged weight; nothing at all before training."""
    conv, x = make_layer(name)
    weight, bias, before = conv.weight.detach().clone(), conv.bias, conv(x)
    tuned = tune(copy.deepcopy(conv)).double()
    assert isinstance(tuned, TunedConv2d)
    assert torch.equal(tuned(x), before)
    disturb(tuned)
    found = values_of(tuned)
    up, down = found["whole.up"], found["whole.down"]
    assert up.shape == (conv.out_channels, 2) and down.shape == (2, weight[0].numel())
    new = weight + torch.einsum("or,ri->oi", up, down).reshape(weight.shape)
    new_bias = None if bias is None else bias.detach() + found["bias_delta.values"]
    wanted = by_hand(conv, x, new, new_bias)
    outputs = tuned(x)
    assert not torch.allclose(wanted, before)
    assert torch.allclose(outputs, wanted, rtol=1e-12, atol=1e-12)
    parameters = list(found.values())
    for mine, theirs in zip(
        torch.autograd.grad(outputs.square().sum(), parameters),
        torch.autograd.grad(wanted.square().sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10)
    plain = tuned.to_plain()
    assert type(plain) is nn.Conv2d
    assert torch.allclose(plain.weight, new, rtol=1e-13, atol=1e-13)
    assert torch.allclose(plain(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_adapters_read_the_channels_of_each_place(name: str) -> None:
    conv, x = make_layer(name)
    tuned = tune(copy.deepcopy(conv), "adapter").double()
    assert torch.equal(tuned(x), conv(x))
    disturb(tuned)
    found = values_of(tuned)
    bias = None if conv.bias is None else conv.bias + found["bias_delta.values"]
    z = by_hand(conv, x, conv.weight, bias)
    wanted = z.clone()
    for sample, row, column in [(s, r, c) for s in range(3) for r in range(z.shape[2]) for c in range(z.shape[3])]:
        hidden = found["whole.down"] @ z[sample, :, row, column] + found["whole.down_bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        wanted[sample, :, row, column] += found["whole.up"] @ hidden + found["whole.up_bias"]
    assert torch.allclose(tuned(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["depthwise", "pointwise, strided"])
def test_dropout_is_on_what_modules_read_and_drop_path_on_samples(name: str) -> None:
    conv, x = make_layer(name)
    tuned = tune(copy.deepcopy(conv), options=ModuleOptions(dropout=0.5)).double().train()
    disturb(tuned)
    found = values_of(tuned)
    update = (found["whole.up"] @ found["whole.down"]).reshape(conv.weight.shape)
    frozen = by_hand(conv, x, conv.weight, conv.bias + found["bias_delta.values"])
    torch.manual_seed(3)
    outputs = tuned(x)
    torch.manual_seed(3)
    kept = F.dropout(torch.ones_like(x if name == "depthwise" else x[..., ::2]), 0.5)
    dropped = x.clone()
    dropped[..., :: 1 if name == "depthwise" else 2] *= kept
    assert torch.allclose(outputs, frozen + by_hand(conv, dropped, update, None), rtol=1e-12, atol=1e-12)
    whole = frozen + by_hand(conv, x, update, None)
    assert torch.allclose(tuned.eval()(x), whole, rtol=1e-12, atol=1e-12)

    tuned = tune(copy.deepcopy(conv), options=ModuleOptions(drop_path=0.25)).double().train()
    disturb(tuned)
    many = x[:1].expand(64, -1, -1, -1)
    plain, full = conv(x[:1]) + tuned.bias_delta.values[:, None, None], tuned.eval()(x[:1])
    seen = {"left out": 0, "scaled": 0}
    for output in tuned.train()(many):
        is_out = torch.allclose(output, plain[0], atol=1e-12)
        assert is_out or torch.allclose(output, plain[0] + (full - plain)[0] / 0.75, atol=1e-12)
        seen["left out" if is_out else "scaled"] += 1
    assert min(seen.values()) > 5


def test_which_convolutions_are_matrices() -> None:
    assert {name: matrix_kind(make()) for name, make in LAYERS.items()} == {
        "depthwise": "depthwise",
        "two outputs a channel": "depthwise",
        "dilated, around the rim": "depthwise",
        "pointwise": "pointwise",
        "pointwise, strided": "pointwise",
    }
    others = [nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1)]
    assert [matrix_kind(conv) for conv in (*others, nn.Conv2d(1, 4, 3), nn.Conv1d(4, 4, 1))] == [None] * 5


def test_costs_are_those_of_the_flattened_weight() -> None:
    assert structured_cost("lora", (96, 1, 7, 7), 8) == 8 * (96 + 49)
    assert structured_cost("adapter", (96, 1, 7, 7), 8) == 2 * 8 * 96 + 8 + 96
    assert structured_cost("lora", (384, 96, 1, 1), 8) == structured_cost("lora", (384, 96), 8)
    model = make_model("convolutions")
    plan = make_plan("lora", model, rank=3, targets=["conv_dw", "fc2"])
    dims = (8, 16, 24, 32)
    assert len(plan.matrices) == 8
    assert plan.num_trainable == sum(3 * (dim + 49) + 3 * (dim + 4 * dim) for dim in dims)
    tuned = inject(model, plan)
    assert plan.num_trainable == sum(p.numel() for n, p in trainable_parameters(tuned) if n not in plan.head)
    assert "stages.blocks.conv_dw.weight" in plan.summary()


def test_a_kernel_gets_a_module_where_that_is_cheaper() -> None:
    """A 7 x 7 kernel for 8 channels and a module of rank 1: 8 + 49 parameters."""
    for alpha, least in ((1.0, 57), (10.0, 6)):
        chooser = Chooser(AllocationRule("lora", True, 1, alpha, None), ["conv"], [(8, 1, 7, 7)], ["conv"])
        assert [unit.cost for unit in chooser.choose([least]).units] == [57]
        assert chooser.choose([least - 1]).sparse == ["conv"]
    model, (images, labels) = make_model("convolutions"), make_images("convolutions")
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    kernels = {f"stages.{stage}.blocks.0.conv_dw.weight" for stage in range(4)}
    assert {name for name in scores.info.matrices if "conv" in name} == kernels
    plan = allocate(scores, budget=0.9, rank=1)
    assert kernels & plan.matrices.keys()
    assert plan.num_trainable <= 0.9 * plan.backbone_size
    tuned = inject(model, plan)
    assert plan.num_trainable == sum(p.numel() for n, p in trainable_parameters(tuned) if n not in plan.head)


def test_prompts_are_refused_in_a_line() -> None:
    model, (images, labels) = make_model("convolutions"), make_images("convolutions")
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    with pytest.raises(UserError, match=r"'prompt': stages\.0\.blocks\.0 works with convolutions, .* choose \"lora\""):
        allocate(scores, budget=0.1, structured="prompt")
    with pytest.raises(UserError, match=r"stages\.0\.blocks\.0, which is a ConvNeXtBlock"):
        make_plan("vpt", model)


class _Read(StructuredModule):
    """Reads the input, and says nothing of a weight."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(spec.out_features, spec.in_features, device=spec.device))

    def forward(self, inputs: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        return F.linear(inputs, self.matrix.to(inputs.dtype))


class _Dense(_Read):
    """The same, with its update."""

    def delta(self) -> Tensor:
        """``(O, I)``."""
        return self.matrix.detach().double()


def test_kinds_of_ones_own() -> None:
    """On a depthwise layer a module that reads the input has to be an update of the weight."""
    known = dict(KINDS), dict(MODULES)
    try:
        for name, cls in (("read", _Read), ("dense", _Dense)):
            register_structured(name, cost=lambda shape, rank: math.prod(shape))(cls)
        conv, x = make_layer("depthwise")
        with pytest.raises(UserError, match=r"0\.conv\.weight can't have a read module: each row of a depthwise"):
            tune(copy.deepcopy(conv), "read")
        for name, kind in (("depthwise", "dense"), ("pointwise", "read")):
            conv, x = make_layer(name)
            tuned = tune(copy.deepcopy(conv), kind).double()
            disturb(tuned)
            found = values_of(tuned)
            weight = conv.weight + found["whole.matrix"].view_as(conv.weight)
            wanted = by_hand(conv, x, weight, conv.bias + found["bias_delta.values"])
            assert torch.allclose(tuned(x), wanted, rtol=1e-12, atol=1e-12)
            # Trained also where what it says of the weight has no gradient.
            assert torch.autograd.grad(tuned(x).square().sum(), found["whole.matrix"])[0].abs().min() > 0
    finally:
        for registry, before in zip((KINDS, MODULES), known, strict=True):
            registry.clear()
            registry.update(before)


def make_tuned(*targets: str, rank: int = 2) -> nn.Module:
    """The small ConvNeXt with LoRA on some operations, trained a little."""
    model = make_model("convolutions")
    tuned = inject(model, make_plan("lora", model, rank=rank, targets=list(targets)))
    disturb(tuned)
    return tuned


def test_autocast_compilation_layout_and_copies() -> None:
    tuned, (images, labels) = make_tuned("conv_dw", "fc1", "fc2"), make_images("convolutions")
    outputs = tuned(images)
    F.cross_entropy(outputs, labels).backward()
    wanted = {name: parameter.grad for name, parameter in trainable_parameters(tuned)}
    tuned.zero_grad()
    assert torch.equal(copy.deepcopy(tuned)(images), outputs)
    compiled = torch.compile(tuned, backend="aot_eager", fullgraph=True)
    F.cross_entropy(compiled(images), labels).backward()
    for name, parameter in trainable_parameters(tuned):
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5), name
    tuned.zero_grad()
    last = copy.deepcopy(tuned).to(memory_format=torch.channels_last)
    assert torch.allclose(last(images.to(memory_format=torch.channels_last)), outputs, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = tuned(images)
        loss = F.cross_entropy(rough.float(), labels)
    loss.backward()
    assert 0 < (rough.float() - outputs).abs().max() < 0.1 * outputs.abs().max()
    assert all(parameter.grad.abs().max() > 0 for _, parameter in trainable_parameters(tuned))
    # The kernel's update is formed in fp32: bf16 would lose it beside the weight.
    conv = tuned.get_submodule("stages.0.blocks.0.conv_dw")
    with torch.autocast("cpu", torch.bfloat16):
        kernel = conv._kernel(conv.structured["whole"])
    delta = conv.structured["whole"].delta().view_as(kernel)
    assert torch.allclose(kernel.double(), delta, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_peft_takes_pointwise_ones(tmp_path: Any) -> None:
    from peft import PeftModel

    tuned, (images, _) = make_tuned("fc1", "fc2"), make_images("convolutions")
    folder = save_peft(tuned, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(make_model("convolutions"), folder).eval()
    assert torch.allclose(theirs(images), tuned(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(make_model("convolutions")(images), tuned(images), atol=1e-2)
    assert torch.equal(load_peft(make_model("convolutions"), folder)(images), tuned(images))
    with pytest.raises(UserError, match=r"stages\.0\.blocks\.0\.conv_dw is a depthwise convolution"):
        save_peft(make_tuned("conv_dw"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def step(engine_config: EngineConfig) -> dict[str, Tensor]:
    """The state, on rank 0, after two steps of an engine over all samples; every rank has a share of equal size."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = make_model("convolutions").requires_grad_(False)
    plan = make_plan("lora", model, rank=2, targets=["conv_dw", "fc1", "fc2"])
    if engine_config.type == "fsdp":
        shard(model, None, CPU)
    elif engine_config.zero_stage == 3:
        partition(model, engine_config)
    torch.manual_seed(0)
    engine = build_engine(engine_config, inject(model, plan), OptimizerSettings(lr=1e-2, weight_decay=0.1), CPU)
    images, labels = make_images("convolutions")
    for _ in range(2):
        outputs = engine(images[rank::size])
        engine.backward(F.cross_entropy(outputs, labels[rank::size]))
        engine.step()
    return engine.gather_state()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_engines_that_spread_weights(name: str) -> None:
    config = EngineConfig(type="fsdp") if name == "fsdp" else EngineConfig(type="deepspeed", zero_stage=3)
    (wanted,) = run_ranks(step, 1, EngineConfig(type="ddp"))
    found = run_ranks(step, 2, config)[0]
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-5), key
    assert float(wanted["exp_avg/stages.0.blocks.0.conv_dw.structured.whole.up"].abs().max()) > 1e-5


def test_parallel_adapters_stay_behind_depthwise_layers() -> None:
    """Their input has no place for a matrix of its own, though a 2 x 2 kernel has as many weights as channels."""
    conv = nn.Conv2d(4, 4, 2, groups=4)
    for layer, reads_output in ((conv, True), (nn.Conv2d(4, 4, 1), False)):
        tuned = tune(layer, "adapter", ModuleOptions(parallel=("conv",)))
        assert tuned.structured["whole"].reads_output == reads_output
        disturb(tuned)
        assert not torch.equal(tuned(torch.ones(1, 4, 3, 3)), tuned.to_plain()(torch.ones(1, 4, 3, 3)))


def test_the_densest_plan_knows_kernels() -> None:
    """Single weights in every column of the flattened kernel; and no plan from scores keeps more than it."""
    model, (images, labels) = make_model("convolutions"), make_images("convolutions")
    densest = densest_plan(AllocationRequest(budget=0.1, structured=None), take_inventory(model))
    assert len(densest.sparse["stages.3.blocks.0.conv_dw.weight"]) == 49
    assert len(densest.sparse["stages.3.blocks.0.mlp.fc2.weight"]) == 4 * 32
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    for budget in (0.1, 0.9):
        request = AllocationRequest(budget=budget, rank=2)
        plan = allocate(scores, **vars(request))
        most = kept_by(inject(make_model("convolutions"), densest_plan(request, take_inventory(model))).train(), images)
        assert kept_by(inject(make_model("convolutions"), plan).train(), images) <= most


def test_merged_models_have_nothing_left() -> None:
    tuned, (images, _) = make_tuned("conv_dw", "fc1"), make_images("convolutions")
    merged = merge(tuned)
    assert {type(module) for module in merged.modules()} == {type(m) for m in make_model("convolutions").modules()}
    assert torch.allclose(merged(images), tuned(images), rtol=1e-4, atol=1e-5)
