"""PEFT folders, with peft itself as the witness; and the way back."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Must come before timm and peft: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # noqa: F401  # isort: skip

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import Plan, UserError, inject, trainable_parameters
from spt_dist.files import load_tensors, save_tensors
from spt_dist.tuning.export import peft as peft_format
from spt_dist.tuning.export.peft import ADAPTER_FILE, CONFIG_FILE, REST_FILE, load_peft, save_peft
from spt_dist.tuning.methods import make_plan
from tests.models_for_tests import make_samples, make_vit
from tests.tuning.export.test_hub import full_disk
from tests.tuning.plans_for_tests import disturb, make_images, make_model, random_plan

# Asking the hub for a backbone's config would need a network; peft warns that it did not.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


def make_tuned(*targets: str, seed: int = 1) -> nn.Module:
    """The small ViT with LoRA of rank 2 on the operations ``targets``, trained a little."""
    model = make_vit()
    tuned = inject(model, make_plan("lora", model, rank=2, targets=list(targets)))
    disturb(tuned, seed)
    return tuned


def fold_lora_and_head(tuned: nn.Module, plain: nn.Module) -> nn.Module:
    """``plain`` with the low-rank updates and the head of ``tuned`` in its weights, and nothing else of it."""
    trained = {name: value.detach() for name, value in trainable_parameters(tuned)}
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    for name in [name for name in trained if name.endswith(".down")]:
        module = name.removesuffix(".down")
        layer, _, part = module.partition(".structured.")
        weight = weights[f"{layer}.weight"]
        rows = weight if part == "whole" else weight.chunk(3)["qkv".index(part)]
        rows += trained[f"{module}.up"] @ trained[f"{module}.down"]
    head = {name: value for name, value in trained.items() if name.startswith("head")}
    plain.load_state_dict(weights | head)
    return plain


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_tuned("q"),
        lambda: make_tuned("q", "v"),
        lambda: make_tuned("q", "k", "v", "proj", "fc1", "fc2"),
        lambda: inject_random("vit", 1),
        lambda: inject_random("windows", 1),
    ],
    ids=["q", "q and v", "all", "random", "random, windows"],
)
def test_peft_applies_and_merges_low_rank_modules_and_head(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    tuned = make()
    kind = "vit" if isinstance(tuned, timm.models.VisionTransformer) else "windows"
    images, _ = make_images(kind)
    save_peft(tuned, tmp_path)
    wanted = fold_lora_and_head(tuned, make_model(kind))(images)
    assert not torch.allclose(wanted, make_model(kind)(images), atol=0.1)
    loaded = PeftModel.from_pretrained(make_model(kind), tmp_path).eval()
    assert torch.allclose(loaded(images), wanted, rtol=1e-4, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(images), wanted, rtol=1e-4, atol=1e-5)
    check_changed_rows(tuned.spt_plan, make_model(kind).state_dict(), merged.state_dict())


def test_the_card_s_code_applies_modules_on_projections_that_timm_does_not_call(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
        return timm.create_model("beit_base_patch16_224", num_classes=5, **sizes).eval()

    images = torch.randn(2, 3, 32, 32)
    model = make()
    tuned = inject(model, make_plan("lora", model, rank=2, targets=["q", "v"]))
    disturb(tuned)
    save_peft(tuned, tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path))
    names: dict[str, Any] = {"weights": make().state_dict()}
    exec(code.replace("...  #", "backbone.load_state_dict(weights)  #"), names)
    assert torch.allclose(names["model"](images), tuned(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(make()(images), tuned(images), atol=0.01)


def inject_random(kind: str, seed: int) -> nn.Module:
    """A small model with a random plan, trained a little."""
    model = make_model(kind)
    tuned = inject(model, random_plan(model, seed))
    disturb(tuned)
    return tuned


def check_changed_rows(plan: Plan, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """All rows with a low-rank module have changed; nothing else has but the head, exactly nothing."""
    assert before.keys() == after.keys()
    for name, value in before.items():
        parts = [name.replace("qkv", part) for part in "qkv"] if name.endswith("qkv.weight") else [name]
        for part, old, new in zip(parts, value.chunk(len(parts)), after[name].chunk(len(parts)), strict=True):
            assert torch.equal(old, new) == (part not in plan.matrices and name not in plan.head), part


def test_only_the_layers_of_the_plan_are_targeted(tmp_path: Path) -> None:
    """``blocks.1`` is not ``blocks.11``; and a layer's own rank is the sum over its modules, at scale 1."""
    model = make_vit(depth=12)
    names = ["blocks.1.attn.q", "blocks.11.attn.q", "blocks.11.attn.k", "blocks.11.attn.v", "blocks.2.mlp.fc1"]
    shapes = {f"{name}.weight": (24, 24) for name in names} | {"blocks.2.mlp.fc1.weight": (96, 24)}
    plan = Plan(matrices={name: "lora" for name in shapes}, head=["head.weight", "head.bias"], shapes=shapes, rank=2)
    tuned = inject(model, plan)
    disturb(tuned)
    save_peft(tuned, tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(depth=12), tmp_path).eval()
    layers = {name: module for name, module in loaded.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    assert ranks == {"blocks.1.attn.qkv": 2, "blocks.11.attn.qkv": 6, "blocks.2.mlp.fc1": 2}
    assert all(layer.scaling["default"] == 1 for layer in layers.values())
    images, _ = make_samples(3)
    assert torch.allclose(loaded(images), tuned(images), rtol=1e-4, atol=1e-5)


class Layer(nn.Module):
    """A fused projection, and within it another layer whose projection has the same last name."""

    def __init__(self, inner: nn.Module | None) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.last = nn.Linear(24, 8)
        self.inner = inner or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., 8)`` to ``(..., 8)``."""
        outputs: Tensor = self.inner(self.last(self.qkv(x)))
        return outputs


def test_names_that_end_alike_are_told_apart_without_a_head(tmp_path: Path) -> None:
    model = Layer(Layer(None))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    shapes = {"q.weight": (8, 8), "v.weight": (8, 8), "inner.v.weight": (8, 8), "inner.last.weight": (8, 24)}
    tuned = inject(model, Plan(matrices={name: "lora" for name in shapes}, shapes=shapes, rank=2))
    disturb(tuned)
    save_peft(tuned, tmp_path)
    plain = Layer(Layer(None))
    plain.load_state_dict(weights)
    x = torch.rand(3, 8)
    assert torch.allclose(PeftModel.from_pretrained(plain, tmp_path)(x), tuned(x), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["vit", "registers, layer scale", "windows"]), st.integers(0, 10_000), st.sampled_from([10, 3, 0])
)
def test_the_way_back_is_exact(
    tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int, num_classes: int
) -> None:
    """Plan, trained values, what they were before, and outputs; whatever head the backbone comes with."""
    model = make_model(kind)
    plan = random_plan(model, seed)
    assume(plan.matrices)
    tuned = inject(model, plan)
    disturb(tuned)
    folder = tmp_path_factory.mktemp("peft")
    save_peft(tuned, folder)
    backbone = make_model(kind)
    if num_classes != 10:
        backbone.reset_classifier(num_classes)
    loaded = load_peft(backbone, folder)
    assert loaded is backbone
    check_same_task(loaded, tuned)
    images, _ = make_images(kind)
    assert torch.equal(loaded(images), tuned(images))


def check_same_task(loaded: nn.Module, tuned: nn.Module) -> None:
    """Two tuned models have the same task."""
    tensors, metadata = tuned.spt_plan.to_tensors()
    found_tensors, found_metadata = loaded.spt_plan.to_tensors()
    assert json.dumps(found_metadata) == json.dumps(metadata)
    assert loaded.spt_fingerprint == tuned.spt_fingerprint
    for wanted, found in (
        (tensors, found_tensors),
        (tuned.spt_originals, loaded.spt_originals),
        (dict(trainable_parameters(tuned)), dict(trainable_parameters(loaded))),
    ):
        assert wanted.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_an_adapter_that_peft_trained_on_comes_back(tmp_path: Path) -> None:
    tuned = make_tuned("proj", "fc1", "fc2")
    save_peft(tuned, tmp_path)
    images, _ = make_samples(4)
    trained = train_with_peft(make_vit(), tmp_path)
    assert not torch.allclose(trained(images), tuned(images), atol=0.1)
    loaded = load_peft(make_vit(), tmp_path)
    assert torch.allclose(loaded(images), trained(images), rtol=1e-4, atol=1e-5)
    assert not torch.equal(loaded.get_parameter("head.weight"), tuned.get_parameter("head.weight"))


def train_with_peft(backbone: nn.Module, folder: Path) -> nn.Module:
    """Load a folder with peft, take a few steps, and save it there again."""
    model = PeftModel.from_pretrained(backbone, folder, is_trainable=True)
    images, labels = make_samples(4)
    optimizer = torch.optim.SGD(filter(lambda parameter: parameter.requires_grad, model.parameters()), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model.eval()


def test_blocks_that_peft_mixed_are_refused(tmp_path: Path) -> None:
    tuned = make_tuned("q", "v")
    save_peft(tuned, tmp_path)
    train_with_peft(make_vit(), tmp_path)
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.lora_B has [\d,]+ values outside the blocks of q, v"):
        load_peft(make_vit(), tmp_path)


def rewrite(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Damage: change the tensors or the values of one file."""

    def damage(folder: Path) -> None:
        path = folder / name
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        else:
            content = load_file(path)
            change(content)
            save_file(content, path)

    return damage


def rewrite_rest(change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> Callable[[Path], object]:
    """Damage: change the tensors or the metadata of the second file."""

    def damage(folder: Path) -> None:
        tensors, metadata = load_tensors(folder / REST_FILE, "peft_rest")
        change(tensors, metadata)
        save_tensors(folder / REST_FILE, tensors, metadata)

    return damage


def truncate(name: str) -> Callable[[Path], object]:
    """Damage: cut the end of a file off."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-50])


FIRST_B = "base_model.model.blocks.0.attn.qkv.lora_B.weight"
HEAD = "base_model.model.head.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no second file": (lambda folder: (folder / REST_FILE).unlink(), "has no spt_rest.safetensors"),
    "no adapter": (lambda folder: (folder / ADAPTER_FILE).unlink(), f"{ADAPTER_FILE}: no such file"),
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), f"{CONFIG_FILE}: no such file"),
    "second file cut": (truncate(REST_FILE), f"{REST_FILE}: not a readable safetensors file"),
    "adapter cut": (truncate(ADAPTER_FILE), f"{ADAPTER_FILE}: not a readable safetensors file"),
    "config cut": (truncate(CONFIG_FILE), f"{CONFIG_FILE}: not a readable JSON file"),
    "config of another sort": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), f"{CONFIG_FILE}: r is None"),
    "other scale": (rewrite(CONFIG_FILE, lambda config: config.update(lora_alpha=16)), "lora_alpha is 16, exported as"),
    "scale by another rule": (
        rewrite(CONFIG_FILE, lambda config: config.update(use_rslora=True)),
        "use_rslora is True",
    ),
    "matrix missing": (rewrite(ADAPTER_FILE, lambda adapter: adapter.pop(FIRST_B)), f"has no {FIRST_B}"),
    "head missing": (rewrite(ADAPTER_FILE, lambda adapter: adapter.pop(HEAD)), f"has no {HEAD}"),
    "further tensor": (
        rewrite(ADAPTER_FILE, lambda adapter: adapter.update(more=torch.zeros(2))),
        "holds more, which the exported task has not",
    ),
    "other rank": (
        rewrite(ADAPTER_FILE, lambda adapter: adapter.update({FIRST_B: torch.zeros(72, 1)})),
        r"blocks\.0\.attn\.qkv has matrices of shape \(\d, 24\) and \(72, 1\)",
    ),
    "fewer rows": (
        rewrite(ADAPTER_FILE, lambda adapter: adapter.update({FIRST_B: adapter[FIRST_B][:10]})),
        r"blocks\.0\.attn\.qkv\.structured\.\w\.up has shape \(\d+, 2\), not \(24, 2\)",
    ),
    "other width": (
        rewrite(ADAPTER_FILE, lambda adapter: adapter.update({HEAD: torch.zeros(10, 7)})),
        r"head\.weight has shape \(10, 7\)",
    ),
    "other version": (rewrite_rest(lambda _, metadata: metadata.update(version=99)), "of version 99"),
    "other version of the task": (rewrite_rest(lambda _, metadata: metadata["delta"].update(version=99)), "version 99"),
    "trained value missing": (
        rewrite_rest(lambda tensors, _: tensors.pop("state/cls_token")),
        r"parameters differ from the model's \(first: cls_token\)",
    ),
    "other kind": (rewrite_rest(lambda _, metadata: metadata.update(kind="delta")), "this is a delta file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_and_leave_the_backbone_alone(damage: str, tmp_path: Path) -> None:
    save_peft(inject_random("vit", 1), tmp_path)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    backbone = make_vit()
    # A head that loading would replace.
    backbone.reset_classifier(3)
    check_refused(backbone, tmp_path, message)


def check_refused(backbone: nn.Module, folder: Path, message: str) -> None:
    """Loading fails, and everything about the backbone is as before, its head's values too."""
    modules = [(name, module, type(module)) for name, module in backbone.named_modules()]
    values = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_peft(backbone, folder)
    assert str(folder) in str(caught.value)
    assert [(name, module, type(module)) for name, module in backbone.named_modules()] == modules
    assert backbone.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_other_backbones_are_refused(tmp_path: Path) -> None:
    tuned = make_tuned("q")
    save_peft(tuned, tmp_path)
    check_refused(make_vit(seed=1), tmp_path, "vit_tiny_patch16_224 with other weights")
    with pytest.raises(UserError, match="injected already"):
        load_peft(tuned, tmp_path)


def test_plans_that_peft_has_no_type_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tuning modules"):
        save_peft(make_vit(), tmp_path)
    for kinds, message in (
        (("adapter",), r"attn.*\.weight has a module of kind 'adapter', which PEFT has no type for"),
        (("lora", "prompt"), r"blocks\.\d has a module of kind 'prompt', .* \(1 such\); share the task file"),
        ((), "has no LoRA module, so PEFT has nothing to load; export the merged model"),
    ):
        model = make_vit()
        with pytest.raises(UserError, match=message):
            save_peft(inject(model, random_plan(model, 1, kinds)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_earlier_exports_are_replaced(tmp_path: Path) -> None:
    tuned, other = make_tuned("q"), make_tuned("fc1", seed=2)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        save_peft(tuned, tmp_path / "file")
    with pytest.raises(UserError, match="holds other files than an earlier peft export"):
        save_peft(tuned, tmp_path)
    folder = tmp_path / "new" / "folder"
    save_peft(tuned, folder)
    (folder / "notes.txt").write_text("mine")
    save_peft(other, folder)
    check_same_task(load_peft(make_vit(), folder), other)
    assert (folder / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [REST_FILE, ADAPTER_FILE, "README.md", CONFIG_FILE])
def test_an_export_that_was_interrupted_is_no_export(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = make_tuned("q")
    save_peft(tuned, tmp_path)
    with full_disk(monkeypatch, peft_format, name), pytest.raises(OSError, match="full"):
        save_peft(make_tuned("fc1"), tmp_path)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(make_vit(), tmp_path)
    check_refused(make_vit(), tmp_path, "the export is not complete")
    save_peft(tuned, tmp_path)
    check_same_task(load_peft(make_vit(), tmp_path), tuned)


def test_the_card_tells_what_peft_alone_applies_and_its_code_runs(tmp_path: Path) -> None:
    tuned = inject_random("vit", 1)
    plan = tuned.spt_plan
    save_peft(tuned, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    in_modules = sum(value.numel() for name, value in trainable_parameters(tuned) if ".structured." in name)
    assert f"{in_modules:,} of {plan.num_trainable:,} trained" in " ".join(card.split())
    assert f"The other {plan.num_trainable - in_modules:,} (" in " ".join(card.split())
    assert tuned.spt_fingerprint in card
    assert plan.summary() in card
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == f"vit_tiny_patch16_224@{tuned.spt_fingerprint[:12]}"
    with_peft, with_us = run_code(card, tmp_path)
    images, _ = make_samples(3)
    assert torch.allclose(with_peft(images), fold_lora_and_head(tuned, make_vit())(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(with_us(images), tuned(images))

    save_peft(make_tuned("q"), tmp_path, base_model="mine/vit")
    assert "everything that was trained: the head and 192 parameters" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["base_model_name_or_path"] == "mine/vit"


def run_code(card: str, folder: Path) -> list[nn.Module]:
    """The models that the pieces of code in a card make, in order, each from the backbone of the first piece."""
    models = []
    names: dict[str, Any] = {"weights": make_vit().state_dict()}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        code = code.replace("...  # load the weights of the backbone", "backbone.load_state_dict(weights)")
        names["backbone"] = make_vit()
        exec(code.replace("FOLDER", str(folder)), names)
        models.append(names["model"])
    return models
