"""Random plans from injection to merging: outputs, files, and the exact set of weights that change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import Plan, inject, load_delta, merge, save_delta, trainable_parameters
from spt_dist.allocation.kinds import RELEASED_MODULES, ModuleOptions
from spt_dist.models.matrices import Inventory, take_inventory
from spt_dist.tuning.registry import is_mergeable
from tests.models_for_tests import pick
from tests.tuning.plans_for_tests import MODELS, make_images, make_model, random_plan

KINDS = [("lora",), ("adapter",), ("prompt",), ("lora", "adapter"), ("adapter", "prompt", "lora")]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(MODELS)), st.sampled_from(KINDS), st.sampled_from([None, RELEASED_MODULES]), st.data())
def test_random_plans_inject_train_save_load_merge(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    kinds: tuple[str, ...],
    modules: ModuleOptions | None,
    data: st.DataObject,
) -> None:
    """Identity at step 0; the exact set of changed weights; save, load and merge reproduce the outputs."""
    seed = data.draw(st.integers(0, 10_000))
    kinds = tuple(name for name in kinds if name != "prompt" or kind in ("vit", "registers, layer scale")) or ("lora",)
    model, (images, labels) = make_model(kind), make_images(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = model(images)
    plan = random_plan(model, seed, kinds, modules)
    tuned = inject(model, plan)
    assert tuned is model
    assert "prompt" in plan.matrices.values() or modules is not None or torch.equal(tuned(images), wanted)
    assert [name for name in tuned.state_dict() if name in before] == list(before)
    head = sum(tuned.get_parameter(name).numel() for name in plan.head)
    assert sum(parameter.numel() for _, parameter in trainable_parameters(tuned)) - head == plan.num_trainable

    train(tuned, images, labels)
    path = tmp_path_factory.mktemp("delta") / "task.safetensors"
    save_delta(tuned, path)
    outputs = tuned(images).detach()
    assert not torch.equal(outputs, wanted)
    loaded = load_delta(make_model(kind), path)
    assert torch.equal(loaded(images), outputs)
    assert loaded.spt_plan.modules == plan.modules
    merged = merge(loaded)
    assert torch.allclose(merged(images), outputs, rtol=1e-4, atol=1e-5)
    assert torch.equal(loaded(images), outputs), "merging must leave the tuned model alone"
    check_changed_weights(take_inventory(make_model(kind)), before, merged.state_dict(), plan)
    if all(map(is_mergeable, plan.matrices.values())):
        check_is_plain(merged, make_model(kind))
        assert torch.equal(inject(merged, random_plan(merged, seed + 1))(images), merge(loaded)(images))
    else:
        save_delta(merged, path)
        folded = {name: value for name, value in merged.state_dict().items() if name in before}
        plain = make_model(kind)
        plain.load_state_dict(folded)
        assert torch.equal(load_delta(plain, path)(images), merged(images)), "what stays is a task of its own"


def train(tuned: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Two steps of AdamW in training mode, which dropout and drop-path see."""
    tuned.train()
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable_parameters(tuned)], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(tuned(images), labels).backward()
        optimizer.step()
    tuned.eval()


def check_is_plain(merged: nn.Module, plain: nn.Module) -> None:
    """The same modules, names and parameters, in the same order."""
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in plain.named_parameters()]


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
            in_weights = is_mergeable(plan.matrices.get(parameter.name, "none"))
            assert (len(changed) > 0) == in_weights, parameter.name
    for name in before.keys() - seen:
        assert torch.equal(before[name], after[name])
