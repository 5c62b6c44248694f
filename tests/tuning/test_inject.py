"""Injection, merging and task files, against the unmerged model and against dense autograd."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
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
from spt_dist.models.matrices import take_inventory
from spt_dist.tuning.methods import make_plan
from spt_dist.tuning.vectors import VectorDelta
from tests.models_for_tests import make_samples, make_vit, pick


def random_plan(model: nn.Module, seed: int) -> Plan:
    """Each weight, bias and norm of the model is frozen, structured, whole or sparse at random."""
    generator = torch.Generator().manual_seed(seed)
    inventory = take_inventory(model)
    plan = Plan(parameters=["cls_token"], head=inventory.head, rank=2, backbone_size=inventory.backbone_size)
    plan.shapes["cls_token"] = tuple(model.get_parameter("cls_token").shape)
    for parameter in inventory.parameters:
        how = int(torch.randint(3, (), generator=generator))
        # k's bias has no gradient: Adam would blow rounding noise up to whole steps.
        if how == 0 or parameter.name.endswith("attn.k.bias"):
            continue
        plan.shapes[parameter.name] = parameter.shape
        if how == 1 and parameter.is_matrix:
            plan.matrices[parameter.name] = "lora"
        elif how == 1:
            plan.vectors.append(parameter.name)
        else:
            count = int(torch.randint(1, parameter.numel + 1, (), generator=generator))
            plan.sparse[parameter.name] = torch.randperm(parameter.numel, generator=generator)[:count].sort().values
    return plan


def disturb(model: nn.Module, seed: int = 1) -> None:
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_random_plans_inject_train_save_load_merge(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Identity at step 0; the exact set of changed weights; save, load and merge reproduce the outputs."""
    model, (images, labels) = make_vit(), make_samples(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = model(images)
    plan = random_plan(model, seed)
    tuned = inject(model, plan)
    assert tuned is model
    assert torch.equal(tuned(images), wanted)
    head = sum(tuned.get_parameter(name).numel() for name in plan.head)
    assert sum(parameter.numel() for _, parameter in trainable_parameters(tuned)) - head == plan.num_trainable

    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable_parameters(tuned)], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(tuned(images), labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("delta") / "task.safetensors"
    save_delta(tuned, path)
    outputs = tuned(images).detach()
    assert not torch.equal(outputs, wanted)
    loaded = load_delta(make_vit(), path)
    assert torch.equal(loaded(images), outputs)
    merged = merge(loaded)
    assert torch.allclose(merged(images), outputs, rtol=1e-4, atol=1e-5)
    assert torch.equal(loaded(images), outputs), "merging must leave the tuned model alone"
    assert [type(module) for module in merged.modules()] == [type(module) for module in make_vit().modules()]
    check_changed_weights(before, merged.state_dict(), plan)


def check_changed_weights(before: dict[str, Tensor], after: dict[str, Tensor], plan: Plan) -> None:
    """Only what the plan names has changed; of sparsely tuned tensors only the chosen entries."""
    assert before.keys() == after.keys()
    in_place = {*plan.parameters, *plan.head}
    for parameter in take_inventory(make_vit()).parameters:
        changed = (pick(before, parameter.name) != pick(after, parameter.name)).flatten().nonzero().flatten()
        if parameter.name in plan.sparse:
            assert set(changed.tolist()) <= set(plan.sparse[parameter.name].tolist())
            # An unlucky entry's update may round to nothing.
            assert len(changed) > 0.5 * len(plan.sparse[parameter.name])
        elif parameter.name not in plan.matrices and parameter.name not in plan.vectors:
            assert len(changed) == 0, parameter.name
        else:
            assert len(changed) > 0, parameter.name
    for name in before.keys() - in_place:
        if not name.startswith("blocks") and not name.startswith("norm"):
            assert torch.equal(before[name], after[name])


def test_gradients_equal_those_of_dense_weights() -> None:
    """A tuned value's gradient is the dense weight gradient at its place, fused projections included."""
    model, (images, labels) = make_vit(), make_samples(5)
    dense = make_vit()
    F.cross_entropy(dense(images), labels).backward()
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
    plan = random_plan(model, 7)
    plan.matrices.clear()
    tuned = inject(model, plan)
    F.cross_entropy(tuned(images), labels).backward()
    checked = set()
    for parameter in take_inventory(make_vit()).parameters:
        name = parameter.name
        if name not in plan.vectors and name not in plan.sparse:
            continue
        positions = plan.sparse.get(name, torch.arange(parameter.numel))
        layer = tuned.get_submodule(parameter.module)
        weight_holder = "weight_delta" if isinstance(layer, nn.LayerNorm) else "sparse"
        holder = layer.get_submodule({"weight": weight_holder, "bias": "bias_delta"}[parameter.parameter])
        found = dict(zip(places_of(holder), holder.values.grad.tolist(), strict=True))
        offset = parameter.start * (parameter.shape[1] if parameter.is_matrix else 1)
        mine = torch.tensor([found[int(place) + offset] for place in positions])
        assert torch.allclose(mine, pick(gradients, name).flatten()[positions], rtol=1e-4, atol=1e-6), name
        checked.add((parameter.parameter, weight_holder, parameter.start > 0))
    assert {("weight", "sparse", True), ("bias", "sparse", True), ("weight", "weight_delta", False)} <= checked


def places_of(holder: nn.Module) -> list[int]:
    """Flat places in the layer's own parameter of a holder's values."""
    if isinstance(holder, VectorDelta):
        return holder.positions.tolist()
    return (holder.rows[holder.row_of] * holder.in_features + holder.columns[holder.column_of]).tolist()


def test_frozen_weights_get_no_gradient_and_keep_their_names() -> None:
    model = make_vit()
    names = set(model.state_dict())
    tuned = inject(model, random_plan(model, 3))
    images, labels = make_samples(2)
    F.cross_entropy(tuned(images), labels).backward()
    assert names <= set(tuned.state_dict())
    for name, parameter in tuned.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    layer = tuned.get_submodule("blocks.0.attn.qkv")
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (24, 72, (72, 24))


def test_merge_is_exact_in_float64() -> None:
    model, (images, _) = make_vit().double(), make_samples(3)
    tuned = inject(model, random_plan(model, 11)).double()
    disturb(tuned)
    outputs = tuned(images.double())
    assert torch.allclose(merge(tuned)(images.double()), outputs, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_backbones_of_other_dtypes_train_without_autocast(dtype: torch.dtype) -> None:
    model, (images, labels) = make_vit().to(dtype), make_samples(3)
    wanted = model(images.to(dtype))
    tuned = inject(model, random_plan(model, 5))
    assert torch.equal(tuned(images.to(dtype)), wanted)
    F.cross_entropy(tuned(images.to(dtype)), labels).backward()
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(tuned))


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


def test_plans_for_other_models_are_refused_before_anything_changes() -> None:
    model = make_vit()
    plan = random_plan(make_vit(depth=3), 1)
    with pytest.raises(UserError, match=r"blocks\.2\..* is no weight"):
        inject(model, plan)
    with pytest.raises(UserError, match="has shape"):
        inject(model, random_plan(make_vit(embed_dim=32), 1))
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


def test_unknown_lora_targets_are_refused() -> None:
    with pytest.raises(UserError, match="'query' is no operation of this model; it has fc1, fc2, k, proj, q, v"):
        make_plan("lora", make_vit(), targets=["query"])


def test_the_table_of_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_vit()
    plan = random_plan(model, 2)
    print_trainable_parameters(inject(model, plan))
    printed = capsys.readouterr().out
    assert f"{plan.num_trainable:,}" in printed
    assert "head" in printed
    assert "attn.q.weight" in printed
