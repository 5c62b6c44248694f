"""Kinds of structured modules that a user adds, from registration to merging."""

import importlib.util
import inspect
import logging
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import (
    ModuleSpec,
    Plan,
    Scores,
    StructuredModule,
    UserError,
    allocate,
    estimate_sensitivity,
    inject,
    load_delta,
    merge,
    register_structured,
    save_delta,
    trainable_parameters,
)
from spt_dist.allocation.kinds import KINDS
from spt_dist.tuning import registry
from spt_dist.tuning.registry import MODULES, is_mergeable
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.plans_for_tests import disturb

IMAGES, LABELS = make_samples(8)
MODULE_NAME = "kinds_of_a_user"


@pytest.fixture(autouse=True)
def _own_kinds_are_forgotten() -> Iterator[None]:
    """A test's kinds are gone after it, and what it imported."""
    before = (dict(KINDS), dict(MODULES))
    yield
    for known, was in zip((KINDS, MODULES), before, strict=True):
        known.clear()
        known.update(was)
    sys.modules.pop(MODULE_NAME, None)


def import_example(folder: Path) -> None:
    """Put the example of registry.py's docstring into a file as it stands, with the imports it needs."""
    docstring = inspect.getdoc(registry)
    _, _, behind = docstring.partition("::\n")
    code = textwrap.dedent(behind[: behind.index("``allocate(")])
    assert code.strip().startswith('@register_structured("scale"')
    imports = ("import torch", "from torch import Tensor, nn")
    own = "from spt_dist import ModuleSpec, StructuredModule, register_structured"
    path = folder / f"{MODULE_NAME}.py"
    path.write_text("\n".join([*imports, own, code]))
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module
    spec.loader.exec_module(module)


def make_scores() -> Scores:
    return estimate_sensitivity(make_vit(), [(IMAGES, LABELS)], F.cross_entropy)


def train_a_step(tuned: nn.Module) -> None:
    tuned.train()
    optimizer = torch.optim.SGD([parameter for _, parameter in trainable_parameters(tuned)], lr=0.5)
    F.cross_entropy(tuned(IMAGES), LABELS).backward()
    optimizer.step()
    tuned.eval()


def test_the_documented_example_from_allocation_to_merging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import_example(tmp_path)
    wanted = make_vit()(IMAGES)
    plan = allocate(make_scores(), budget=600, structured="scale", alpha=10.0)
    scaled = [name for name, kind in plan.matrices.items() if kind == "scale"]
    assert 0 < len(scaled) == len(plan.matrices)
    assert plan.method == "spt-scale"
    assert plan.num_structured == sum(plan.shapes[name][0] for name in scaled)
    assert plan.num_sparse > 0
    assert plan.num_trainable <= 600
    plan.save(tmp_path / "plan.safetensors")
    tuned = inject(make_vit(), Plan.load(tmp_path / "plan.safetensors"))
    head = sum(tuned.get_parameter(name).numel() for name in plan.head)
    assert sum(parameter.numel() for _, parameter in trainable_parameters(tuned)) == plan.num_trainable + head
    assert torch.equal(tuned(IMAGES), wanted)

    train_a_step(tuned)
    outputs = tuned(IMAGES).detach()
    factors = {name: p for name, p in trainable_parameters(tuned) if name.endswith(".factor")}
    assert len(factors) == len(scaled)
    assert all(factor.abs().max() > 0 for factor in factors.values())
    save_delta(tuned, tmp_path / "task.safetensors")
    loaded = load_delta(make_vit(), tmp_path / "task.safetensors")
    assert torch.equal(loaded(IMAGES), outputs)
    check_scaling(loaded, scaled)

    with caplog.at_level(logging.WARNING):
        merged = merge(loaded)
    assert f"{len(scaled)} modules stay beside the merged weights (scale)" in caplog.text
    assert "what they compute is no update of a weight" in caplog.text
    assert sorted(merged.spt_plan.matrices) == sorted(scaled)
    assert torch.allclose(merged(IMAGES), outputs, rtol=1e-5, atol=1e-5)


def check_scaling(tuned: nn.Module, scaled: list[str]) -> None:
    """Scaling the rows of the plain layers by 1 + factor, biases too, gives the same outputs."""
    plain = make_vit()
    state = plain.state_dict()
    folded = merge_all_but_modules(tuned)
    for name in folded:
        state[name] = folded[name]
    for name in scaled:
        *path, operation, _ = name.split(".")
        is_fused = operation in ("q", "k", "v")
        layer = ".".join([*path, "qkv" if is_fused else operation])
        size = len(state[f"{layer}.weight"]) // (3 if is_fused else 1)
        rows = slice("qkv".index(operation) * size, ("qkv".index(operation) + 1) * size) if is_fused else slice(0, size)
        factor = 1 + tuned.get_parameter(f"{layer}.structured.{operation if is_fused else 'whole'}.factor").detach()
        state[f"{layer}.weight"][rows] *= factor[:, None]
        state[f"{layer}.bias"][rows] *= factor
    plain.load_state_dict(state)
    assert torch.allclose(plain(IMAGES), tuned(IMAGES), rtol=1e-4, atol=1e-5)


def merge_all_but_modules(tuned: nn.Module) -> dict[str, Tensor]:
    """The plain model's state with single weights and vectors in it."""
    return {name: value.clone() for name, value in merge(tuned).state_dict().items() if name in make_vit().state_dict()}


class RankOne(StructuredModule):
    """``x -> (x a) b``, linear in ``x``."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(spec.in_features, device=spec.device))
        self.b = nn.Parameter(torch.zeros(spec.out_features, device=spec.device))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs @ self.a.to(inputs.dtype)).unsqueeze(-1) * self.b.to(inputs.dtype)

    def delta(self) -> Tensor:
        return torch.outer(self.b.double(), self.a.double())


def test_a_linear_kind_is_merged_exactly(tmp_path: Path) -> None:
    register_structured("rank-one", cost=lambda shape, rank: sum(shape))(RankOne)
    assert is_mergeable("rank-one")
    plan = allocate(make_scores(), budget=1500, structured="rank-one", alpha=10.0)
    assert any(".attn.k." in name or ".attn.v." in name for name in plan.matrices), "some are parts of a fused layer"
    assert any(".mlp." in name for name in plan.matrices)
    tuned = inject(make_vit().double(), plan).double()
    disturb(tuned)
    outputs = tuned(IMAGES.double()).detach()
    assert not torch.allclose(outputs, make_vit().double()(IMAGES.double()), rtol=1e-2)
    save_delta(tuned, tmp_path / "task.safetensors")
    merged = merge(tuned)
    assert torch.allclose(merged(IMAGES.double()), outputs, rtol=1e-12, atol=1e-12)
    assert list(merged.state_dict()) == list(make_vit().state_dict())
    assert not hasattr(merged, "spt_plan")


def test_own_modules_are_given_what_the_plan_says() -> None:
    """Sizes, the options, and in training mode dropout and drop-path as for all kinds."""
    seen: list[ModuleSpec] = []

    @register_structured("watcher", cost=lambda shape, rank: rank * shape[1])
    class Watcher(StructuredModule):
        def __init__(self, spec: ModuleSpec) -> None:
            super().__init__()
            seen.append(spec)
            self.values = nn.Parameter(torch.ones(spec.rank, spec.in_features))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[..., :1].expand(*inputs.shape[:-1], 96)

    name = "blocks.0.mlp.fc1.weight"
    plan = allocate(make_scores(), tau=0, structured="watcher", rank=5, preset="released")
    plan.matrices[name], plan.shapes[name] = "watcher", (96, 24)
    layer = inject(make_vit(), plan).get_submodule("blocks.0.mlp.fc1")
    assert seen == [ModuleSpec(24, 96, 5, "normal", False, torch.device("cpu"))]
    x = torch.rand(2000, 1, 24) + 1
    plain = F.linear(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x), plain + x[..., :1])
    updates = (layer.train()(x) - plain)[:, 0, 0]
    assert float((updates.abs() < 1e-5).double().mean()) == pytest.approx(1 - 0.9 * 0.9, abs=0.03)
    kept = updates.abs() > 1e-5
    assert torch.allclose(updates[kept], x[kept, 0, 0] / 0.81, rtol=1e-4, atol=1e-4)


def test_a_wrong_cost_is_refused() -> None:
    register_structured("rank-one", cost=lambda shape, rank: shape[0])(RankOne)
    name = "blocks.1.mlp.fc1.weight"
    model = make_vit()
    plan = Plan(matrices={name: "rank-one"}, shapes={name: (96, 24)}, backbone_size=1)
    message = r"structured='rank-one': a RankOne for 96 x 24 weights has 120 parameters, but its cost was .* as 96;"
    with pytest.raises(UserError, match=message):
        inject(model, plan)
    assert torch.equal(model(IMAGES), make_vit()(IMAGES))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["lora", "adapter", "prompt", "rank-one"])
def test_a_taken_name_is_refused(name: str) -> None:
    register_structured("rank-one", cost=lambda shape, rank: sum(shape))(RankOne)
    before = (dict(KINDS), dict(MODULES))
    with pytest.raises(UserError, match=f"the name '{name}' is taken; choose another one"):
        register_structured(name, cost=lambda shape, rank: 1)(StructuredModule)
    assert (dict(KINDS), dict(MODULES)) == before


def test_only_structured_modules_are_registered() -> None:
    with pytest.raises(UserError, match="Linear has to be a subclass of StructuredModule"):
        register_structured("plain", cost=lambda shape, rank: 1)(nn.Linear)
    assert "plain" not in KINDS


@pytest.mark.parametrize("cost", [0, -5, 2.5, None])
def test_costs_that_are_no_numbers_of_parameters_are_refused(cost: object) -> None:
    register_structured("rank-one", cost=lambda shape, rank: cost)(RankOne)
    with pytest.raises(UserError, match=r"structured='rank-one': its cost has to be a whole number of parameters"):
        allocate(make_scores(), tau=100, structured="rank-one")


def test_the_same_class_may_be_registered_again() -> None:
    """As when a notebook's cell is run twice; the later cost and class hold."""
    for factor in (1, 2):
        register_structured("rank-one", cost=lambda shape, rank, factor=factor: factor * sum(shape))(RankOne)
    assert KINDS["rank-one"].cost((3, 4), 1) == 14


class WithBuffer(RankOne):
    """Reads a buffer that only this process knows."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec)
        self.register_buffer("noise", torch.rand(3))


def test_buffers_that_task_files_would_lose_are_refused() -> None:
    register_structured("with-buffer", cost=lambda shape, rank: sum(shape))(WithBuffer)
    name = "blocks.1.mlp.fc1.weight"
    with pytest.raises(UserError, match=r"a WithBuffer keeps buffers \(noise\), which task files don't hold"):
        inject(make_vit(), Plan(matrices={name: "with-buffer"}, shapes={name: (96, 24)}))


class SeesAxes(StructuredModule):
    """Adds nothing and notes the shapes of what it is given."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))
        self.out_features = spec.out_features
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.shapes.append(tuple(inputs.shape))
        return self.zero.expand(*inputs.shape[:-1], self.out_features)


def test_modules_are_given_the_layers_own_axes() -> None:
    register_structured("sees-axes", cost=lambda shape, rank: 1)(SeesAxes)
    names = {"blocks.0.attn.k.weight": (24, 24), "blocks.0.mlp.fc2.weight": (24, 96)}
    tuned = inject(make_vit(), Plan(matrices=dict.fromkeys(names, "sees-axes"), shapes=names))
    assert torch.equal(tuned(IMAGES), make_vit()(IMAGES))
    seen = [module.shapes for module in tuned.modules() if isinstance(module, SeesAxes)]
    assert seen == [[(len(IMAGES), 5, 24)], [(len(IMAGES), 5, 96)]]


def test_an_unknown_kind_says_what_to_import(tmp_path: Path) -> None:
    register_structured("rank-one", cost=lambda shape, rank: sum(shape))(RankOne)
    name = "blocks.1.mlp.fc1.weight"
    plan = Plan(matrices={name: "rank-one"}, shapes={name: (96, 24)}, backbone_size=1)
    plan.save(tmp_path / "plan.safetensors")
    save_delta(inject(make_vit(), plan), tmp_path / "task.safetensors")
    del KINDS["rank-one"], MODULES["rank-one"]

    message = (
        "structured='rank-one': no such kind of module; choose one of lora, adapter, prompt, or import the file that "
        r"registers it first \(custom_imports in a config"
    )
    model = make_vit()
    with pytest.raises(UserError, match=message):
        allocate(make_scores(), tau=10, structured="rank-one")
    with pytest.raises(UserError, match=message):
        inject(model, Plan.load(tmp_path / "plan.safetensors"))
    with pytest.raises(UserError, match=message):
        load_delta(model, tmp_path / "task.safetensors")
    with pytest.raises(UserError, match=message):
        Plan.load(tmp_path / "plan.safetensors").summary()
    assert torch.equal(model(IMAGES), make_vit()(IMAGES))
    assert not hasattr(model, "spt_plan")


def test_own_kinds_of_other_tests_are_not_seen() -> None:
    assert list(KINDS) == ["lora", "adapter", "prompt"]
    assert list(MODULES) == ["lora", "adapter"]
