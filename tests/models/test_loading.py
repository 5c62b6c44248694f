"""Backbone loading, inventory and fingerprints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spt_dist import UserError
from spt_dist.models.checkpoints import load_backbone, resolve_checkpoint
from spt_dist.models.classifier import build_classifier
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.matrices import take_inventory
from tests.models_for_tests import make_vit


def test_inventory_covers_every_weight_once() -> None:
    model = make_vit()
    inventory = take_inventory(model)
    named = inventory.head + list(inventory.skipped)
    counted = sum(parameter.numel for parameter in inventory.parameters)
    counted += sum(model.get_parameter(name).numel() for name in named)
    assert counted == sum(parameter.numel() for parameter in model.parameters())
    assert inventory.backbone_size == counted - 250
    assert [parameter.name for parameter in inventory.parameters[:12]] == [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
        "blocks.0.attn.q.weight",
        "blocks.0.attn.k.weight",
        "blocks.0.attn.v.weight",
        "blocks.0.attn.q.bias",
        "blocks.0.attn.k.bias",
        "blocks.0.attn.v.bias",
    ]
    assert inventory.always_tuned == ["cls_token"]


def test_tied_parameters_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(UserError, match=r"1\.weight: shares its values with 0\.weight"):
        take_inventory(model)


def test_fingerprints_tell_weights_apart_and_ignore_the_head() -> None:
    model = make_vit()
    name = fingerprint(model)
    assert name == fingerprint(make_vit()) == fingerprint(make_vit().train())
    model.get_parameter("head.weight").data += 1
    assert fingerprint(model) == name
    model.reset_classifier(3)
    assert fingerprint(model) == name
    model.get_parameter("pos_embed").data[0, 0, 0] += 1e-6
    assert fingerprint(model) != name
    assert fingerprint(make_vit(seed=1)) != name


def test_a_backbone_file_is_loaded_completely_and_the_head_stays(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    save_file(make_vit().state_dict(), path)
    model = make_vit(seed=1)
    head = model.get_parameter("head.weight").clone()
    load_backbone(model, str(path))
    assert fingerprint(model) == fingerprint(make_vit())
    assert torch.equal(model.get_parameter("head.weight"), head)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    state = make_vit().state_dict()
    save_file({name: value for name, value in state.items() if name != "norm.weight"}, path)
    with pytest.raises(UserError, match=r"1 of 30 keys are missing \(first: \['norm\.weight'\]\)"):
        load_backbone(make_vit(), str(path))
    save_file(state | {"extra": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"1 are unexpected \(first: \['extra'\]\)"):
        load_backbone(make_vit(), str(path))
    save_file(make_vit(embed_dim=32).state_dict(), path)
    with pytest.raises(UserError, match=r"cls_token has shape \(1, 1, 32\), the model needs \(1, 1, 24\)"):
        load_backbone(make_vit(), str(path))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_backbone(make_vit(), str(path))
    with pytest.raises(UserError, match="no such file"):
        resolve_checkpoint("package://other.safetensors")


def test_models_timm_does_not_know_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.name='vit_tinny'"):
        build_classifier("vit_tinny", 10)
    with pytest.raises(UserError, match=r"model\.kwargs"):
        build_classifier("vit_tiny_patch16_224", 10, {"embedding": 3})


def test_the_seed_decides_the_head() -> None:
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    first, again, other = (build_classifier("vit_tiny_patch16_224", 10, options, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.get_parameter("head.weight"), again.get_parameter("head.weight"))
    assert not torch.equal(first.get_parameter("head.weight"), other.get_parameter("head.weight"))
