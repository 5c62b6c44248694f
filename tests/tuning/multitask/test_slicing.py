"""Mixed batches in models that do more than pass samples from layer to layer."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_dist import Plan
from spt_dist.models.matrices import take_inventory
from spt_dist.tuning.methods.full import plan_full
from spt_dist.tuning.methods.linear import plan_linear
from spt_dist.tuning.methods.lora import plan_lora
from spt_dist.tuning.multitask.slicing import Slicing, find_slicing
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.multitask.banks_for_tests import check, make_bank, seen_by
from tests.tuning.plans_for_tests import random_plan

SMALL_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
# Two blocks to a stage: every second one shifts its windows and masks some pairs of patches.
SMALL_SWIN: dict[str, Any] = {"img_size": 56, "embed_dim": 24, "depths": (2, 1), "num_heads": (1, 2)}
SMALL_SWIN_V2: dict[str, Any] = {"img_size": 64, "embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2)}


@pytest.mark.parametrize(
    ("name", "kwargs", "num_samples", "size", "is_shared"),
    [
        # Masks that are the same for all samples go beside their windows.
        ("swin_tiny_patch4_window7_224", SMALL_SWIN, 4, 56, True),
        # Tables of relative positions go through Linear layers; the second has as many rows as there are samples.
        ("swinv2_tiny_window8_256", SMALL_SWIN_V2, 4, 64, True),
        ("vit_relpos_small_patch16_224", SMALL_VIT, 7, 32, True),
        # The fused weight is read past its layer, with biases that belong to the attention module.
        ("beit_base_patch16_224", SMALL_VIT, 4, 32, True),
        # A norm behind pooling; a pooling with weights; two heads; a block with two inputs of all samples.
        ("vit_tiny_patch16_224", SMALL_VIT | {"global_pool": "avg"}, 4, 32, True),
        ("vit_so150m_patch16_reg4_map_256", SMALL_VIT, 4, 32, True),
        ("deit_tiny_distilled_patch16_224", SMALL_VIT, 4, 32, True),
        ("cait_xxs24_224", SMALL_VIT, 4, 32, True),
        # The position embedding is resized, which works for one only.
        ("vit_tiny_patch16_224", SMALL_VIT | {"dynamic_img_size": True}, 4, 40, False),
    ],
)
def test_families_of_timm(
    tmp_path: Path, name: str, kwargs: dict[str, Any], num_samples: int, size: int, is_shared: bool
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, **kwargs)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model.eval()

    plans = {str(seed): (partial(random_plan, seed=seed), 3 + seed) for seed in (1, 2, 3)}
    bank, files = make_bank(make, plans, tmp_path)
    images, tasks = torch.randn(num_samples, 3, size, size), [str(1 + sample % 3) for sample in range(num_samples)]
    check(bank, make, files, images, tasks)
    assert seen_by(bank.backbone.patch_embed.proj, partial(bank, images, tasks)) == [num_samples] * is_shared


class PatchesFirst(nn.Module):
    """Runs its layer on all samples' first patches, then on all second ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x_BTI: Tensor) -> Tensor:
        patches = self.layer(x_BTI.transpose(0, 1).flatten(0, 1))
        return patches.unflatten(0, (x_BTI.shape[1], -1)).transpose(0, 1)


class Reader(nn.Module):
    """Reads the weight of its layer, which it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return x_BTI @ self.layer.weight


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.factor + (y if len(x) == len(y) or len(x) == 3 else y.transpose(0, 1))


class Twice(nn.Module):
    """Gives its module the samples first, and a table first another time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()
        self.register_buffer("table", torch.randn(3, 6))

    def forward(self, x_BTI: Tensor) -> Tensor:
        return self.scale(self.table, self.scale(x_BTI, self.table.expand(len(x_BTI), -1, -1)))


class Turned(nn.Module):
    """Gives its module the samples along the first axis and along the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, x_BTI: Tensor) -> Tensor:
        return self.scale(x_BTI, x_BTI.transpose(0, 1))


def make_odd() -> nn.Module:
    torch.manual_seed(0)
    within = [PatchesFirst(), Reader(), Twice(), Turned()]
    return nn.Sequential(nn.Linear(6, 6), *within, nn.Flatten(), nn.Linear(18, 4))


def plan_entries(model: nn.Module) -> Plan:
    """Two entries of each parameter, but for the weight whose layer is never called."""
    shapes = {parameter.name: parameter.shape for parameter in take_inventory(model).parameters}
    shapes.pop("2.layer.weight", None)
    return Plan(sparse={name: torch.arange(2) for name in shapes}, shapes=shapes, backbone_size=1)


def plan_in_place(model: nn.Module, name: str) -> Plan:
    return Plan(parameters=[name], shapes={name: tuple(model.get_parameter(name).shape)}, backbone_size=1)


def test_modules_that_are_run_by_the_one_around_them(tmp_path: Path) -> None:
    plans = {"entries": (plan_entries, 10), "read": (partial(plan_in_place, name="2.layer.weight"), 10)}
    bank, files = make_bank(make_odd, plans, tmp_path)
    images, tasks = torch.randn(4, 3, 6), ["read", "entries", "entries", "read"]
    found = find_slicing(bank.backbone, images)
    assert found.arguments == {str(place): (True,) for place in range(7)}
    assert found.point_for("2.layer") == "2"
    check(bank, make_odd, files, images, tasks)
    assert seen_by(bank.backbone[0], partial(bank, images, tasks)) == [4]


class Root(nn.Module):
    """Reads a table of its own, whose rows are patches, and the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(3, 6))
        self.layer, self.read = nn.Linear(6, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return (self.layer(x_BTI) * self.table).mean(1) @ self.read.weight.mT


@pytest.mark.parametrize(("name", "is_shared"), [("table", False), ("read.weight", False), ("layer.weight", True)])
def test_what_the_root_reads_makes_each_task_run_alone(tmp_path: Path, name: str, is_shared: bool) -> None:
    plans = {"a": (partial(plan_in_place, name=name), 10), "b": (partial(plan_in_place, name="layer.bias"), 10)}
    bank, files = make_bank(Root, plans, tmp_path)
    images, tasks = torch.randn(4, 3, 6), ["a", "b", "b", "a"]
    check(bank, Root, files, images, tasks)
    assert len(seen_by(bank.backbone, partial(bank, images, tasks))) == is_shared


class Centred(nn.Module):
    def forward(self, x_BI: Tensor) -> Tensor:
        return x_BI - x_BI.mean(0) / len(x_BI)


def test_sums_over_samples_make_each_task_run_alone() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), Centred(), nn.Linear(6, 4))

    assert find_slicing(make(), torch.randn(4, 6)) == Slicing()


class Headed(nn.Module):
    """Has a head, but not timm's two stages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 10)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(6, num_classes)

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.head(self.layer(x_BI))


class Doubling(VisionTransformer):
    """Does more than its two stages."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward(x, attn_mask, is_causal)


def make_doubling() -> nn.Module:
    model = make_vit()
    model.__class__ = Doubling
    return model


@pytest.mark.parametrize("make", [Headed, make_doubling])
def test_other_ways_to_the_head_make_each_task_run_alone(tmp_path: Path, make: Any) -> None:
    bank, files = make_bank(make, {"a": (plan_linear, 4), "b": (plan_linear, 3), "c": (plan_full, 3)}, tmp_path)
    images = torch.randn(4, 6) if make is Headed else make_samples(4)[0]
    assert find_slicing(bank.backbone, images) == Slicing()
    check(bank, make, files, images, ["a", "b", "b", "a"])
    check(bank, make, files, images, ["a", "c", "b", "a"])


def test_the_look_at_a_model_is_exact_and_leaves_no_trace() -> None:
    model, images = make_vit(), make_samples(2)[0]
    found = find_slicing(model, images)
    assert {"blocks.0", "blocks.1.attn.qkv", "patch_embed.proj", "norm"} <= found.arguments.keys()
    assert found.behind_trunk == {"fc_norm", "head_drop", "head"}
    dtypes = []
    layer = model.blocks[0].mlp.fc1
    handle = layer.register_forward_hook(lambda module, inputs, outputs: dtypes.append(outputs.dtype))
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert find_slicing(model, images) == found
    handle.remove()
    assert set(dtypes) == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_another_size_of_images_is_looked_at_anew(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return make_vit(dynamic_img_size=True)

    bank, files = make_bank(make, {"a": (plan_lora, 3), "b": (plan_full, 4)}, tmp_path)
    for size, is_shared in ((16, True), (24, False), (16, True)):
        images, tasks = torch.randn(3, 3, size, size), ["a", "b", "a"]
        check(bank, make, files, images, tasks)
        assert seen_by(bank.backbone.patch_embed.proj, partial(bank, images, tasks)) == [3] * is_shared


def test_tuned_norms_behind_the_trunk_do_not_hinder_sharing(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return make_vit(global_pool="avg")

    def plan(model: nn.Module, name: str) -> Plan:
        return Plan(vectors=[name], head=["head.weight", "head.bias"], shapes={name: (24,)}, backbone_size=1)

    plans = {name: (partial(plan, name=name), 10) for name in ("fc_norm.weight", "fc_norm.bias")}
    bank, files = make_bank(make, plans | {"lora": (plan_lora, 3)}, tmp_path)
    images, tasks = make_samples(3)[0], ["lora", "fc_norm.bias", "fc_norm.weight"]
    check(bank, make, files, images, tasks)
    assert seen_by(bank.backbone.patch_embed.proj, partial(bank, images, tasks)) == [3]
