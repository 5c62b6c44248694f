"""Task banks against ``load_delta``'s own models, one sample at a time; memory, mistakes, and what stays untouched."""

import copy
import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spt_dist import ModuleSpec, Plan, UserError, load_delta
from spt_dist.allocation.kinds import KINDS, RELEASED_MODULES, ModuleOptions
from spt_dist.files import load_tensors, save_tensors
from spt_dist.tuning.lora import LowRank
from spt_dist.tuning.methods.full import plan_full
from spt_dist.tuning.methods.linear import plan_linear
from spt_dist.tuning.methods.lora import plan_lora
from spt_dist.tuning.multitask.bank import TaskBank
from spt_dist.tuning.registry import MODULES
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.multitask.banks_for_tests import check, make_bank, seen_by, write_task
from tests.tuning.plans_for_tests import MODELS, make_images, make_model, random_plan

MIXES = [("lora",), ("adapter",), ("prompt",), ("lora", "adapter"), ("adapter", "prompt", "lora")]
SMALL_SWIN: dict[str, Any] = {"img_size": 56, "embed_dim": 24, "depths": (2, 1), "num_heads": (1, 2)}


def write_lora(folder: Path, name: str = "a", classes: int = 10) -> Path:
    """As ``write_task``, LoRA for ``make_vit``."""
    return write_task(make_vit, plan_lora, folder / f"{name}.safetensors", classes)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The same values, no attributes put before parameters or classes, no hooks."""
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(value, before[name]) for name, value in after.items())
    for module in model.modules():
        assert not {"forward", *module._parameters} & module.__dict__.keys()
        assert not module._forward_hooks and not module._forward_pre_hooks


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(MODELS)), st.data())
def test_mixed_batches_of_random_tasks_match_each_sample_alone(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    def make() -> nn.Module:
        return make_model(kind)

    plans = {}
    for number in range(data.draw(st.integers(1, 3), label="tasks")):
        kinds = data.draw(st.sampled_from(MIXES))
        kinds = tuple(name for name in kinds if name != "prompt" or kind in ("vit", "registers, layer scale"))
        modules = data.draw(st.sampled_from([ModuleOptions(), RELEASED_MODULES]))
        seed, classes = data.draw(st.integers(0, 10_000)), data.draw(st.sampled_from([3, 7, 10]))
        plans[f"task.{number}"] = partial(random_plan, seed=seed, kinds=kinds, modules=modules), classes
    bank, files = make_bank(make, plans, tmp_path_factory.mktemp("tasks"))
    before = state_of(bank.backbone)
    tasks = data.draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=6), label="samples")
    check(bank, make, files, make_images(kind, len(tasks))[0], tasks)
    check_untouched(bank.backbone, before)


def test_tasks_that_tune_everything_or_the_head_only(tmp_path: Path) -> None:
    plans = {"full": (plan_full, 3), "linear": (plan_linear, 4), "lora": (plan_lora, 5)}
    bank, files = make_bank(make_vit, plans, tmp_path)
    check(bank, make_vit, files, make_samples(5)[0], ["lora", "full", "linear", "full", "lora"])


def test_a_backbone_without_a_head_takes_tasks_with_heads(tmp_path: Path) -> None:
    files = {"a": write_lora(tmp_path, "a", 3), "b": write_lora(tmp_path, "b")}
    backbone = make_vit()
    backbone.reset_classifier(0)
    bank = TaskBank(backbone)
    for name, path in files.items():
        bank.add(name, path)
    check(bank, make_vit, files, make_samples(4)[0], ["a", "b", "b", "a"])
    assert isinstance(backbone.head, nn.Identity) and backbone.num_classes == 0


def test_the_backbone_sees_a_mixed_batch_once(tmp_path: Path) -> None:
    bank = TaskBank(make_vit())
    bank.add("a", write_lora(tmp_path, "a"))
    bank.add("b", write_lora(tmp_path, "b", 3))
    images = make_samples(6)[0]
    tasks = ["b", "a", "a", "b", "a", "b"]
    bank(images, tasks)
    backbone = bank.backbone
    for layer in (backbone.patch_embed.proj, backbone.blocks[1].attn.qkv, backbone.blocks[1].mlp.fc2):
        assert seen_by(layer, lambda: bank(images, tasks)) == [6]


def test_under_autocast_the_results_agree_roughly(tmp_path: Path) -> None:
    kinds = ("lora", "adapter", "prompt")
    plans = {str(seed): (partial(random_plan, seed=seed, kinds=kinds), 10) for seed in (1, 2, 3)}
    bank, _ = make_bank(make_vit, plans, tmp_path)
    images = make_samples(6)[0]
    tasks = ["1", "3", "2", "1", "2", "3"]
    exact = torch.stack(bank(images, tasks))
    with torch.autocast("cpu", torch.bfloat16):
        rough = torch.stack(bank(images, tasks))
    assert rough.dtype == torch.bfloat16
    assert 0 < (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_moves_and_modes_reach_every_task_and_share_the_backbone(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **SMALL_SWIN).eval()

    bank, files = make_bank(make, {str(seed): (partial(random_plan, seed=seed), 10) for seed in (1, 2)}, tmp_path)
    check_shared(bank)
    bank.double()
    check_shared(bank)
    assert all(value.dtype != torch.float32 for value in [*bank.parameters(), *bank.buffers()])
    images = make_images("windows")[0]
    outputs = bank(images.double(), ["2", "1", "2", "1"])
    for image, task, output in zip(images, ["2", "1", "2", "1"], outputs, strict=True):
        wanted = load_delta(make(), files[task]).double()(image[None].double())[0]
        assert torch.allclose(output, wanted, rtol=1e-10)
    bank.train()
    assert all(module.training for module in bank.modules())
    assert not any(module.training for module in bank.eval().modules())


def check_shared(bank: TaskBank) -> None:
    """Buffers, and a weight that no task trains in place, are the same objects in the backbone and all tasks."""
    weight = "layers.0.blocks.0.attn.qkv.weight"
    common = dict(bank.backbone.named_buffers()) | {weight: bank.backbone.get_parameter(weight)}
    assert any(value.is_floating_point() for value in bank.backbone.buffers())
    for variant in bank._variants:
        own = dict(variant.model.named_buffers()) | dict(variant.model.named_parameters())
        assert all(own[name] is value for name, value in common.items())


def num_bytes(*modules: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_a_task_costs_its_own_parameters_and_gives_them_back(tmp_path: Path) -> None:
    model = make_vit()
    bank, before = TaskBank(model), num_bytes(model)
    bank.add("a", write_lora(tmp_path))
    tuned = load_delta(make_vit(), tmp_path / "a.safetensors")
    own = sum(4 * parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    assert num_bytes(bank) == before + own
    variant = weakref.ref(bank._variants[0])
    bank.switch("a")
    bank.remove("a")
    gc.collect()
    assert variant() is None
    assert num_bytes(bank) == before
    assert bank.names == [] and bank.current is None


def test_a_failing_forward_leaves_the_backbone_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {str(seed): (partial(random_plan, seed=seed), 10) for seed in (1, 2)}
    bank, _ = make_bank(make_vit, plans, tmp_path)
    before, images = state_of(bank.backbone), make_samples(2)[0]
    bank(images, ["1", "2"])

    def fail(*_: object) -> None:
        # Only here, in the midst of a pass, can it be seen that something was in the backbone's place.
        assert "forward" in bank.backbone.blocks[1].mlp.fc1.__dict__ and "cls_token" in bank.backbone.__dict__
        raise RuntimeError("no memory")

    monkeypatch.setattr("spt_dist.tuning.multitask.mixed._update", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        bank(images, ["1", "2"])
    check_untouched(bank.backbone, before)
    with pytest.raises(AssertionError, match="Input"):
        bank(torch.zeros(2, 3, 8, 8), ["1", "2"])
    check_untouched(bank.backbone, before)
    monkeypatch.undo()
    assert len(bank(images, ["1", "2"])) == 2


def test_banks_over_copies_do_not_see_each_other(tmp_path: Path) -> None:
    first, second = TaskBank(make_vit()), TaskBank(make_vit())
    first.add("a", write_lora(tmp_path, "a"))
    second.add("a", write_lora(tmp_path, "b", 3))
    third = copy.deepcopy(first)
    images = make_samples(3)[0]
    first.switch("a")
    second.switch("a")
    before = first(images), second(images)
    assert before[0].shape != before[1].shape
    third.remove("a")
    third.backbone.patch_embed.proj.weight.data.zero_()
    first.remove("a")
    assert torch.equal(second(images), before[1])
    first.add("a", tmp_path / "a.safetensors")
    first.switch("a")
    assert torch.equal(first(images), before[0])


def test_what_is_refused_and_leaves_the_bank_as_it_was(tmp_path: Path) -> None:
    path = write_lora(tmp_path)
    other = write_task(lambda: make_vit(seed=1), plan_lora, tmp_path / "other.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    tensors, metadata = load_tensors(path, "delta")
    name = next(name for name in tensors if name.endswith("down"))
    other_shape = save_tensors(tmp_path / "other_shape.safetensors", {**tensors, name: tensors[name][:1]}, metadata)
    bank, images = TaskBank(make_vit()), make_samples(2)[0]
    bank.add("a", path)
    with pytest.raises(UserError, match="already"):
        bank.add("a", path)
    with pytest.raises(UserError, match=r"other\.safetensors: made for backbone"):
        bank.add("b", other)
    with pytest.raises(UserError, match="truncated"):
        bank.add("b", cut)
    with pytest.raises(UserError, match=r"other_shape\.safetensors: .* has shape \(1, 24\)"):
        bank.add("b", other_shape)
    assert bank.names == ["a"] and len(bank._variants) == 1
    with pytest.raises(UserError, match="no task is current"):
        bank(images)
    for call in (bank.switch, bank.remove, lambda name: bank(images, ["a", name])):
        with pytest.raises(UserError, match="no task 'b'; it has a"):
            call("b")
    with pytest.raises(UserError, match="1 tasks for 2 images"):
        bank(images, ["a"])
    with pytest.raises(UserError, match="injected already"):
        TaskBank(load_delta(make_vit(), path))
    assert bank(images[:0], []) == []


class Noisy(LowRank):
    """A kind of one's own with dropout within."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec)
        self.noise = nn.Dropout(0.5)

    def forward(self, inputs: Tensor, source: object = None) -> Tensor:
        return super().forward(self.noise(inputs))


def test_modules_of_ones_own_are_in_the_backbones_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "noisy", KINDS["lora"])
    monkeypatch.setitem(MODULES, "noisy", Noisy)

    def plan(model: nn.Module) -> Plan:
        return Plan(matrices={"blocks.0.mlp.fc1.weight": "noisy"}, shapes={"blocks.0.mlp.fc1.weight": (96, 24)})

    bank, _ = make_bank(make_vit, {"a": (plan, 10)}, tmp_path)
    bank.switch("a")
    images = make_samples(2)[0]
    assert torch.equal(bank(images), bank(images))


def test_a_cast_backbone_still_takes_its_tasks(tmp_path: Path) -> None:
    bank = TaskBank(make_vit()).double()
    bank.add("a", write_lora(tmp_path))
    bank.switch("a")
    images = make_samples(2)[0].double()
    assert torch.allclose(bank(images), load_delta(make_vit(), tmp_path / "a.safetensors").double()(images))
