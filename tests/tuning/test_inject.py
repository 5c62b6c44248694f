"""Injection, merging and task files, against the unmerged model and against dense autograd."""

from pathlib import Path
from typing import Any

import pytest
import timm
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
from spt_dist.allocation.plan import operation_of
from spt_dist.files import save_tensors
from spt_dist.models.matrices import Inventory, take_inventory
from spt_dist.tuning.delta import describe_delta
from spt_dist.tuning.entries import EntryDelta
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import make_samples, make_vit, pick

SMALL_SWIN: dict[str, Any] = {"img_size": 56, "embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2)}
SMALL_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
# Name of the architecture, its arguments and its images' size; the plain ViT of all tests has no name.
MODELS: dict[str, tuple[str | None, dict[str, Any], int]] = {
    "vit": (None, {}, 16),
    "registers, layer scale": (None, {"init_values": 1e-2, "reg_tokens": 2}, 16),
    "windows": ("swin_tiny_patch4_window7_224", SMALL_SWIN, 56),
    "convolutions": ("convnext_atto", SMALL_CONVNEXT, 128),
}


def make_model(kind: str) -> nn.Module:
    """A small model whose parameters are not at their defaults; always the same one."""
    name, kwargs, _ = MODELS[kind]
    if name is None:
        return make_vit(**kwargs)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def make_images(kind: str, num_samples: int = 4) -> tuple[Tensor, Tensor]:
    """Random images for ``make_model`` and their labels."""
    size = MODELS[kind][2]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_samples, 3, size, size, generator=generator), make_samples(num_samples)[1]


def random_plan(model: nn.Module, seed: int) -> Plan:
    """Each parameter of the model is frozen, structured, whole or sparse at random, but for its head and cls_token."""
    generator = torch.Generator().manual_seed(seed)
    inventory = take_inventory(model)
    plan = Plan(parameters=inventory.always_tuned, head=inventory.head, rank=2, backbone_size=inventory.backbone_size)
    for name in inventory.always_tuned:
        plan.shapes[name] = tuple(model.get_parameter(name).shape)
    for parameter in inventory.parameters:
        how = int(torch.randint(3, (), generator=generator))
        # k's bias has no gradient: Adam would blow rounding noise up to whole steps.
        if how == 0 or parameter.name.endswith("attn.k.bias") or parameter.name in inventory.always_tuned:
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


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(MODELS)), st.integers(0, 10_000))
def test_random_plans_inject_train_save_load_merge(
    tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int
) -> None:
    """Identity at step 0; the exact set of changed weights; save, load and merge reproduce the outputs."""
    model, (images, labels) = make_model(kind), make_images(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = model(images)
    plan = random_plan(model, seed)
    tuned = inject(model, plan)
    assert tuned is model
    assert torch.equal(tuned(images), wanted)
    assert [name for name in tuned.state_dict() if name in before] == list(before)
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
    loaded = load_delta(make_model(kind), path)
    assert torch.equal(loaded(images), outputs)
    merged = merge(loaded)
    assert torch.allclose(merged(images), outputs, rtol=1e-4, atol=1e-5)
    assert torch.equal(loaded(images), outputs), "merging must leave the tuned model alone"
    plain = make_model(kind)
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    assert list(merged.state_dict()) == list(before)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in plain.named_parameters()]
    check_changed_weights(take_inventory(plain), before, merged.state_dict(), plan)
    assert torch.equal(inject(merged, random_plan(merged, seed + 1))(images), merge(loaded)(images))


def check_changed_weights(
    inventory: Inventory, before: dict[str, Tensor], after: dict[str, Tensor], plan: Plan
) -> None:
    """Only what the plan names has changed; of sparsely tuned tensors only the chosen entries."""
    seen = set(plan.head)
    for parameter in inventory.parameters:
        seen.add(".".join(filter(None, (parameter.module, parameter.parameter))))
        changed = (pick(before, parameter.name) != pick(after, parameter.name)).flatten().nonzero().flatten()
        if parameter.name in plan.sparse:
            assert set(changed.tolist()) <= set(plan.sparse[parameter.name].tolist())
            # An unlucky entry's update may round to nothing.
            assert len(changed) > 0.5 * len(plan.sparse[parameter.name])
        elif parameter.name in plan.vectors or parameter.name in plan.parameters:
            assert len(changed) > 0.5 * parameter.numel, parameter.name
        else:
            assert (len(changed) > 0) == (parameter.name in plan.matrices), parameter.name
    for name in before.keys() - seen:
        assert torch.equal(before[name], after[name])


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
        holder_name = "sparse" if parameter.is_matrix else f"{parameter.parameter}_delta"
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


def test_frozen_weights_get_no_gradient_and_layers_keep_their_attributes() -> None:
    model = make_vit()
    tuned = inject(model, random_plan(model, 3))
    images, labels = make_samples(2)
    F.cross_entropy(tuned(images), labels).backward()
    for name, parameter in tuned.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    layer = tuned.get_submodule("blocks.0.attn.qkv")
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (24, 72, (72, 24))


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
    assert plan.matrices
    assert all(operation_of(name) in printed for name in plan.matrices)
