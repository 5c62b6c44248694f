"""Backbone loading, inventory and fingerprints."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from spt_dist import UserError
from spt_dist.models.checkpoints import WeightsFile, load_backbone, resolve_checkpoint
from spt_dist.models.classifier import build_classifier
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.matrices import take_inventory
from spt_dist.models.mmseg_names import to_mmseg
from spt_dist.models.weight_files import open_weights, write_weights
from tests.models.weights_for_tests import Backbone, SmallSegmentor, differing, write
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    state = make_vit().state_dict()
    state["blocks.1.mlp.fc2.weight"][2, 3] = value
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"vit\.safetensors: blocks\.1\.mlp\.fc2\.weight holds NaN or infinity"):
        load_backbone(make_vit(), str(tmp_path / "vit.safetensors"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_kind_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    state = make_vit().state_dict()
    torch.save(state | {"norm.weight": state["norm.weight"].to(dtype)}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"vit\.pth: norm\.weight is .*, but the model's norm\.weight is of floating"):
        load_backbone(make_vit(), str(tmp_path / "vit.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shorter_and_longer_weights_are_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in make_vit().state_dict().items()}
    torch.save(state, tmp_path / "vit.pth")
    model = make_vit(seed=1)
    load_backbone(model, str(tmp_path / "vit.pth"))
    assert torch.equal(model.get_parameter("norm.weight"), state["norm.weight"].float())


def test_positions_that_are_resampled_though_they_have_the_right_shape(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of a square grid and one of the model's own grid, of as many patches, look alike."""
    options = {"img_size": (16, 64), "patch_size": 8}
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=2, **options)
    assert model.pos_embed.shape[1] == 1 + 4 * 4
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    load_backbone(model, str(tmp_path / "vit.safetensors"))
    assert "pos_embed has the right shape and is resampled from 4 x 4 to 2 x 8 all the same" in caplog.text


def with_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": value for name, value in state.items() if not name.startswith("head")}


def as_segmentor(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What mmseg writes after training: other heads than the model's."""
    return to_mmseg(with_prefix(state)) | {
        f"{head}.weight": torch.ones(7) for head in ("decode_head.conv_seg", "auxiliary_head.3.conv", "neck.mla.0")
    }


def of_a_pooled_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: state[name] for name in state}
    return renamed | {"pre_logits.fc.weight": torch.ones(7), "head_dist.bias": torch.ones(7)}


FILES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "classifier": dict,
    "pooled classifier": of_a_pooled_classifier,
    "backbone of a segmentor": with_prefix,
    "mmseg, bare": lambda state: to_mmseg({name: state[name] for name in state if not name.startswith("head")}),
    "mmseg, classifier": to_mmseg,
    "mmseg, segmentor": as_segmentor,
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", FILES)
def test_a_segmentor_takes_a_vit_under_either_naming(tmp_path: Path, kind: str, suffix: str) -> None:
    state = make_vit().state_dict()
    path = write(tmp_path / f"vit{suffix}", FILES[kind](state))
    model = SmallSegmentor()
    heads = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    load_backbone(model, path)
    assert differing(model.backbone, state) == []
    assert all(torch.equal(model.state_dict()[name], value) for name, value in heads.items())
    # The same weights for a bare backbone.
    backbone = Backbone()
    load_backbone(backbone, path)
    assert differing(backbone, state) == []


@pytest.mark.parametrize("kind", FILES)
def test_the_last_norm_is_read_where_there_is_one(tmp_path: Path, kind: str) -> None:
    state = make_vit().state_dict()
    path = write(tmp_path / "vit.safetensors", FILES[kind](state))
    model = SmallSegmentor(final_norm=True)
    if kind == "pooled classifier":
        with pytest.raises(UserError, match=r"2 of 30 keys are missing \(first: \['backbone\.norm\.bias'\]\), 0 are"):
            load_backbone(model, path)
    else:
        load_backbone(model, path)
        assert differing(model.backbone, state) == []


def test_a_segmentor_is_never_loaded_in_part(tmp_path: Path) -> None:
    state = make_vit().state_dict()

    def refusal(content: dict[str, Tensor]) -> str:
        model = SmallSegmentor()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(UserError) as caught:
            load_backbone(model, write(tmp_path / "file.safetensors", content))
        assert differing(model, before) == []
        assert str(tmp_path / "file.safetensors") in str(caught.value)
        return str(caught.value)

    less = {name: value for name, value in state.items() if name != "patch_embed.proj.bias"}
    assert "1 of 28 keys are missing (first: ['backbone.patch_embed.proj.bias']), 0 are" in refusal(to_mmseg(less))
    assert "1 are unexpected (first: ['blocks.0.ls1.gamma'])" in refusal(state | {"blocks.0.ls1.gamma": torch.ones(1)})
    assert "1 are unexpected (first: ['extra'])" in refusal(with_prefix(state) | {"extra": torch.ones(1)})
    assert "1 are unexpected (first: ['cls_token'])" in refusal(with_prefix(state) | {"cls_token": torch.ones(1)})
    # The file's own name is given, not what it would be under timm's.
    more = to_mmseg(with_prefix(make_vit(depth=3).state_dict()))
    assert "12 are unexpected (first: ['backbone.layers.2.attn.attn.in_proj_bias'])" in refusal(more)
    assert "layers.0.gamma: no weight of a plain ViT" in refusal(to_mmseg(state) | {"layers.0.gamma": torch.ones(1)})
    assert "28 of 28 keys are missing" in refusal({"decode_head.weight": torch.ones(3, 5)})
    assert "cls_token has shape (1, 1, 12)" in refusal(make_vit(embed_dim=12).state_dict())


def test_a_backbone_that_is_in_a_file_twice_is_refused(tmp_path: Path) -> None:
    state = make_vit().state_dict()
    path = write(tmp_path / "vit.safetensors", with_prefix(state) | {"cls_token": torch.ones(1, 1, 24)})
    with pytest.raises(UserError, match=r"0 of 28 keys are missing .* 1 are unexpected"):
        load_backbone(Backbone(), path)


def test_a_segmentor_resamples_positions_in_its_own_mode(tmp_path: Path) -> None:
    state = make_vit(img_size=40).state_dict()
    path = write(tmp_path / "vit.safetensors", state)
    model = SmallSegmentor(img_size=16)
    load_backbone(model, path)
    old = state["pos_embed"][:, 1:].reshape(1, 5, 5, 24).permute(0, 3, 1, 2)
    new = F.interpolate(old, (2, 2), mode="bilinear").permute(0, 2, 3, 1).reshape(1, 4, 24)
    assert torch.allclose(model.backbone.pos_embed, torch.cat([state["pos_embed"][:, :1], new], 1), atol=1e-6)
    assert differing(model.backbone, state | {"pos_embed": model.backbone.pos_embed}) == []
    weights = WeightsFile(path)
    weights.check(model)
    assert torch.equal(weights.read_rows("backbone.pos_embed", 0, 1), model.backbone.pos_embed)
    assert weights.read_rows("backbone.pos_embed", 1, 1).shape == (0, 5, 24)
    # A classifier does as timm does.
    other = make_vit(img_size=16)
    load_backbone(other, path)
    assert not torch.allclose(other.get_parameter("pos_embed"), model.backbone.pos_embed, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 25, 24), (1, 7, 24), (1, 26, 12), (2, 26, 24), (26, 24), (1, 1, 24)])
def test_positions_that_are_no_square_grid_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write(tmp_path / "vit.safetensors", make_vit().state_dict() | {"pos_embed": torch.ones(shape)})
    with pytest.raises(UserError, match=r"backbone\.pos_embed has shape"):
        load_backbone(SmallSegmentor(), path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_rows_are_read_by_the_models_names(tmp_path: Path, suffix: str) -> None:
    state = make_vit().state_dict()
    weights = WeightsFile(write(tmp_path / f"vit{suffix}", as_segmentor(state)))
    weights.check(SmallSegmentor())
    found = weights.read_rows("backbone.blocks.1.attn.qkv.weight", 20, 50)
    assert torch.equal(found, state["blocks.1.attn.qkv.weight"][20:50])
    assert torch.equal(weights.read("backbone.blocks.0.mlp.fc2.bias"), state["blocks.0.mlp.fc2.bias"])


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "mmengine": lambda state: {"meta": {"epoch": 3}, "state_dict": state, "optimizer": {"state": {0: torch.ones(1)}}},
    "deit": lambda state: {"model": state, "epoch": 3},
    "deepspeed": lambda state: {"module": state, "lr": [0.1]},
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pytorch_files(tmp_path: Path, layout: str, suffix: str) -> None:
    path = tmp_path / f"vit{suffix}"
    torch.save(LAYOUTS[layout](make_vit().state_dict()), path)
    model = make_vit(seed=1)
    load_backbone(model, str(path))
    assert fingerprint(model) == fingerprint(make_vit())
    # As files were before PyTorch 1.6.
    torch.save(LAYOUTS[layout](make_vit(seed=2).state_dict()), path, _use_new_zipfile_serialization=False)
    load_backbone(model, str(path))
    assert fingerprint(model) == fingerprint(make_vit(seed=2))


def test_tensors_of_a_pytorch_file_outlive_it(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save(make_vit().state_dict(), path)
    weights = WeightsFile(str(path))
    weights.check(make_vit())
    value = weights.read("norm.weight")
    with path.open("r+b") as file:
        file.write(bytes(os.path.getsize(path)))
    assert torch.equal(value, make_vit().state_dict()["norm.weight"])


class Secret:
    """What reading it would do is its own choice."""


def test_pytorch_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            load_backbone(make_vit(), str(path))
        assert str(path) in str(caught.value)
        return str(caught.value)

    torch.save({"state_dict": make_vit().state_dict(), "history": Secret()}, path)
    message = refusal()
    assert "Secret beside its weights" in message
    # What it says to do works.
    torch.save(torch.load(path, weights_only=False)["state_dict"], tmp_path / "new.pth")
    load_backbone(make_vit(seed=1), str(tmp_path / "new.pth"))
    torch.save({"epoch": 3, "net": make_vit().state_dict()}, path)
    message = refusal()
    assert "no state dict" in message and "found epoch, net" in message
    torch.save([torch.ones(1)], path)
    assert "found list" in refusal()
    for old_format in (True, False):
        torch.save(make_vit().state_dict(), path, _use_new_zipfile_serialization=old_format)
        content = path.read_bytes()
        for damaged in (content[:-200], content[:100], b"", b"hello there"):
            path.write_bytes(damaged)
            assert "not a readable PyTorch file" in refusal()


def test_files_of_weights_that_are_no_files(tmp_path: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(UserError, match=rf"none\{suffix}: no such file"):
            open_weights(tmp_path / f"none{suffix}")
    with pytest.raises(UserError, match=r"vit\.onnx: has to end in \.safetensors, \.pth, \.pt or \.bin"):
        write_weights(tmp_path / "vit.onnx", {})
    assert list(tmp_path.iterdir()) == []


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
