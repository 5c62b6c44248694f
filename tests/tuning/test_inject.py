"""Injection, merging and task files, against the unmerged model and against dense autograd."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spt_dist import (
    Plan,
    UserError,
    allocate,
    estimate_sensitivity,
    inject,
    load_delta,
    merge,
    print_trainable_parameters,
    save_delta,
    trainable_parameters,
)
from spt_dist.files import save_tensors
from spt_dist.models.matrices import operation_of, take_inventory
from spt_dist.tuning.delta import describe_delta
from spt_dist.tuning.entries import EntryDelta
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import make_samples, make_vit, pick
from tests.tuning.plans_for_tests import MODELS, disturb, make_images, make_model, random_plan


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_equal_those_of_dense_weights(kind: str) -> None:
    """A tuned value's gradient is the dense weight gradient at its place, fused projections included."""
    model, (images, labels) = make_model(kind), make_images(kind)
    dense = make_model(kind)
    F.cross_entropy(dense(images), labels).backward()
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
    plan = random_plan(model, 7)
    plan.matrices.clear()
    tuned = inject(model, plan)
    F.cross_entropy(tuned(images), labels).backward()
    checked = set()
    for parameter in take_inventory(dense).parameters:
        name = parameter.name
        if name not in plan.vectors and name not in plan.sparse:
            continue
        positions = plan.sparse.get(name, torch.arange(parameter.numel))
        holder_name = "sparse" if parameter.kind in ("linear", "part") else f"{parameter.parameter}_delta"
        holder = tuned.get_submodule(parameter.module).get_submodule(holder_name)
        found = dict(zip(places_of(holder), holder.values.grad.tolist(), strict=True))
        offset = parameter.start * (parameter.shape[1] if parameter.is_matrix else 1)
        mine = torch.tensor([found[int(place) + offset] for place in positions])
        wanted = pick(gradients, name).flatten()[positions]
        assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), name
        checked.add((holder_name, parameter.start > 0, len(parameter.shape)))
    assert checked >= DENSE_CHECKS[kind]


# Holder, whether within a fused projection, axes: what the plan of the test above reaches at least.
DENSE_CHECKS: dict[str, set[tuple[str, bool, int]]] = {
    "vit": {("sparse", True, 2), ("bias_delta", True, 1), ("weight_delta", False, 1)},
    "registers, layer scale": {("reg_token_delta", False, 3), ("pos_embed_delta", False, 3), ("gamma_delta", False, 1)},
    "windows": {("relative_position_bias_table_delta", False, 2), ("weight_delta", False, 1), ("sparse", True, 2)},
    "convolutions": {("weight_delta", False, 4), ("weight_delta", False, 1), ("gamma_delta", False, 1)},
}


def places_of(holder: nn.Module) -> list[int]:
    """Flat places in the layer's own parameter of a holder's values."""
    if isinstance(holder, EntryDelta):
        return holder.positions.tolist()
    return (holder.rows[holder.row_of] * holder.in_features + holder.columns[holder.column_of]).tolist()


def test_hooks_of_replaced_layers_go_on() -> None:
    """Through injection and merging, and their handles still remove them."""
    model, (images, _) = make_vit(), make_samples(2)
    calls: list[str] = []
    handle = model.get_submodule("blocks.0.attn.qkv").register_forward_hook(lambda *_: calls.append("qkv"))
    tuned = inject(model, random_plan(model, 3))
    tuned(images)
    merge(tuned)(images)
    assert calls == ["qkv", "qkv"]
    handle.remove()
    tuned(images)
    assert calls == ["qkv", "qkv"]


def test_a_weight_that_is_unfrozen_gets_its_gradient() -> None:
    """That of a dense layer with the same effective weight, whatever is tuned in it."""
    model, (images, labels) = make_vit(), make_samples(3)
    tuned = inject(model, random_plan(model, 3))
    disturb(tuned)
    dense = merge(tuned)
    tuned.requires_grad_(True)
    for each in (tuned, dense):
        F.cross_entropy(each(images), labels).backward()
    gradients = {name: parameter.grad for name, parameter in tuned.named_parameters()}
    for name, parameter in dense.named_parameters():
        found = gradients[name]
        assert torch.allclose(found, parameter.grad, rtol=1e-3, atol=1e-5), name


def test_computed_weights_are_refused() -> None:
    model = make_vit()
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule("blocks.0.mlp.fc1"))
    name = "blocks.0.mlp.fc1.bias"
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.fc1\.bias is computed by a parametrization"):
        inject(model, Plan(vectors=[name], shapes={name: (96,)}))


def test_a_head_that_the_plan_does_not_name_is_said_to_stay_frozen(caplog: pytest.LogCaptureFixture) -> None:
    plan = random_plan(make_vit(num_classes=0), 3)
    assert not plan.head
    tuned = inject(make_vit(), plan)
    assert "head.weight stays frozen" in caplog.text
    assert not tuned.get_parameter("head.weight").requires_grad


def test_frozen_weights_get_no_gradient_and_layers_keep_their_attributes() -> None:
    model = make_vit()
    tuned = inject(model, random_plan(model, 3))
    images, labels = make_samples(2)
    F.cross_entropy(tuned(images), labels).backward()
    for name, parameter in tuned.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    layer = tuned.get_submodule("blocks.0.attn.qkv")
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (24, 72, (72, 24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_backbones_of_other_dtypes_train_without_autocast(dtype: torch.dtype) -> None:
    model, (images, labels) = make_vit().to(dtype), make_samples(3)
    wanted = model(images.to(dtype))
    tuned = inject(model, random_plan(model, 5))
    assert torch.equal(tuned(images.to(dtype)), wanted)
    F.cross_entropy(tuned(images.to(dtype)), labels).backward()
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(tuned))


def test_compiled_as_one_graph() -> None:
    """Nothing in tuned layers breaks the graph, and gradients are those of the plain run."""
    tuned, (images, labels) = (
        inject(make_vit(), random_plan(make_vit(), 3, ("adapter", "lora", "prompt"))),
        make_samples(3),
    )
    disturb(tuned)
    F.cross_entropy(tuned(images), labels).backward()
    wanted = {name: parameter.grad for name, parameter in trainable_parameters(tuned)}
    tuned.zero_grad()
    compiled = torch.compile(tuned, backend="aot_eager", fullgraph=True)
    F.cross_entropy(compiled(images), labels).backward()
    for name, parameter in trainable_parameters(tuned):
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6), name


def test_autocast_trains() -> None:
    model, (images, labels) = make_vit(), make_samples(3)
    tuned = inject(model, random_plan(model, 5))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(tuned(images).float(), labels)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for _, parameter in trainable_parameters(tuned))


def test_the_public_interface_end_to_end(tmp_path: Path) -> None:
    model, (images, labels) = make_vit(), make_samples(8)
    scores = estimate_sensitivity(model, [(images, labels)], F.cross_entropy)
    plan = allocate(scores, budget=600, rank=2, alpha=10.0, beta=5.0)
    tuned = inject(model, plan)
    disturb(tuned)
    save_delta(tuned, tmp_path / "task.safetensors")
    other_head = make_vit(num_classes=3)
    backbone = {name: value for name, value in make_vit().state_dict().items() if not name.startswith("head.")}
    other_head.load_state_dict(backbone, strict=False)
    assert torch.equal(load_delta(other_head, tmp_path / "task.safetensors")(images), tuned(images))


def test_wrong_backbones_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    model = make_vit()
    tuned = inject(model, random_plan(model, 1))
    save_delta(tuned, path)
    with pytest.raises(UserError, match="vit_tiny_patch16_224 with other weights"):
        load_delta(make_vit(seed=1), path)
    with pytest.raises(UserError, match="injected already"):
        load_delta(tuned, path)
    with pytest.raises(UserError, match="injected already"):
        inject(tuned, random_plan(make_vit(), 1))
    with pytest.raises(UserError, match="no such file"):
        load_delta(make_vit(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="call inject"):
        save_delta(make_vit(), path)
    with pytest.raises(UserError, match="no tuning modules"):
        merge(make_vit())
    random_plan(make_vit(), 1).save(tmp_path / "plan.safetensors")
    with pytest.raises(UserError, match="this is a plan file"):
        load_delta(make_vit(), tmp_path / "plan.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_delta(make_vit(), path)


def test_a_task_file_that_does_not_fit_leaves_the_backbone_alone(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    model = make_vit()
    tuned = inject(model, random_plan(model, 1))
    state = dict(trainable_parameters(tuned))
    first = next(name for name in state if name.endswith("values"))
    for damage in ({first: state[first][:-1]}, {"blocks.9.values": state[first]}):
        save_tensors(path, *describe_delta(tuned, {**state, **damage}))
        backbone = make_vit()
        before = [(name, type(module)) for name, module in backbone.named_modules()]
        with pytest.raises(UserError, match=next(iter(damage))):
            load_delta(backbone, path)
        assert [(name, type(module)) for name, module in backbone.named_modules()] == before
        assert all(parameter.requires_grad for parameter in backbone.parameters())
        assert all(torch.equal(value, make_vit().state_dict()[name]) for name, value in backbone.state_dict().items())
        save_delta(tuned, path)
        load_delta(backbone, path)


def test_a_backbone_without_a_head_gets_the_tasks(tmp_path: Path) -> None:
    tuned = inject(make_vit(), random_plan(make_vit(), 1))
    disturb(tuned)
    save_delta(tuned, tmp_path / "task.safetensors")
    headless = make_vit()
    headless.reset_classifier(0)
    images, _ = make_samples(3)
    assert torch.equal(load_delta(headless, tmp_path / "task.safetensors")(images), tuned(images))


def test_plans_for_other_models_are_refused_before_anything_changes() -> None:
    model = make_vit()
    plan = random_plan(make_vit(depth=3), 1)
    with pytest.raises(UserError, match=r"blocks\.2\..* is no weight"):
        inject(model, plan)
    with pytest.raises(UserError, match="has shape"):
        inject(model, random_plan(make_vit(embed_dim=32), 1))
    twice = random_plan(model, 1)
    twice.parameters.append(twice.vectors[0])
    with pytest.raises(UserError, match="more than one way"):
        inject(model, twice)
    wrong = Plan(matrices={"patch_embed.proj.weight": "lora"}, shapes={"patch_embed.proj.weight": (24, 3, 8, 8)})
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight can't have a lora module"):
        inject(model, wrong)
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject(model, random_plan(model, 1))


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("linear", {}, 0),
        ("lora", {"rank": 3}, 2 * 2 * 3 * 48),
        ("lora", {"rank": 1, "targets": ["fc1"]}, 2 * (24 + 96)),
    ],
)
def test_peer_methods_count(method: str, options: dict[str, object], count: int) -> None:
    model = make_vit()
    plan = make_plan(method, model, **options)
    assert plan.num_trainable == count
    tuned = inject(model, plan)
    assert sum(parameter.numel() for _, parameter in trainable_parameters(tuned)) == count + 250


def test_full_fine_tuning_trains_everything() -> None:
    model = make_vit()
    total = sum(parameter.numel() for parameter in model.parameters())
    plan = make_plan("full", model)
    assert plan.num_trainable == plan.backbone_size == total - 250
    assert all(parameter.requires_grad for parameter in inject(model, plan).parameters())


def test_plans_out_of_files(tmp_path: Path) -> None:
    model, path = make_vit(), str(tmp_path / "plan.safetensors")
    plan = random_plan(model, 2)
    plan.save(path)
    assert make_plan("plan", model, path=path).summary() == plan.summary()
    with pytest.raises(UserError, match=r"method\.preset='released': is for published allocations"):
        make_plan("plan", model, path=path, preset="released")


def test_unknown_lora_targets_are_refused() -> None:
    with pytest.raises(UserError, match="'q' is no operation of this model; it has none with a name"):
        make_plan("lora", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(UserError, match="'query' is no operation of this model; it has fc1, fc2, k, proj, q, v"):
        make_plan("lora", make_vit(), targets=["query"])


def test_the_table_of_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_vit()
    plan = random_plan(model, 2)
    print_trainable_parameters(inject(model, plan))
    printed = capsys.readouterr().out
    assert f"{plan.num_trainable:,}" in printed
    assert "head" in printed
    assert plan.matrices
    assert all(operation_of(name) in printed for name in plan.matrices)
