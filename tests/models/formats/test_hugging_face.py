"""ViTs, Swins and ConvNeXts of Hugging Face's transformers: its own models' files, and what its own models compute."""

import spt_dist  # noqa: F401  # isort: skip

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spt_dist import UserError
from spt_dist.models.checkpoints import WeightsFile, copy_weights, load_backbone
from spt_dist.models.formats import translate
from spt_dist.models.matching import match_tensors
from tests.models.formats.hugging_face_kinds import (
    COMPUTED,
    KINDS,
    VIT_OF_TIMM,
    make_reference,
    make_theirs,
    make_timm,
    of_hub,
)
from tests.models.formats.published import Listed, images, shapes_of


def _as_state(path: Path, kind: str) -> Path:
    torch.save(make_theirs(kind).state_dict(), path / "pytorch_model.bin")
    return path / "pytorch_model.bin"


def _as_saved(path: Path, kind: str) -> Path:
    make_theirs(kind).save_pretrained(path)
    return path / "model.safetensors"


def _as_published(path: Path, kind: str) -> Path:
    save_file({name: value.clone() for name, value in of_hub(kind).items()}, path / "model.safetensors")
    return path / "model.safetensors"


def features(kind: str, model: Any) -> tuple[Tensor, Tensor]:
    """What both compute for the same images: all tokens, or places, behind the last norm or stage."""
    case, theirs = KINDS[kind], make_theirs(kind)
    size = 64 if kind.startswith("ConvNeXt") else 32
    # What DINOv3 calls so are its layers.
    wanted = (theirs.base_model if case.prefix else theirs)(images(size)).last_hidden_state
    found = model.forward_features(images(size))
    if case.shuffled:
        return found[:, 0], wanted[:, 0]
    return (found.flatten(1, 2) if kind.startswith("Swin") else found), wanted


@pytest.mark.parametrize("write", [_as_state, _as_saved, _as_published])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_features(tmp_path: Path, kind: str, write: Callable[[Path, str], Path]) -> None:
    case, path = KINDS[kind], write(tmp_path, kind)
    model = make_timm(kind)
    weights = WeightsFile(str(path))
    account = weights.check(model, keep_head=case.has_head)
    copy_weights(model, weights)
    torch.testing.assert_close(*features(kind, model), rtol=1e-9, atol=KINDS[kind].tolerance)
    if case.has_head:
        size = 64 if kind.startswith("ConvNeXt") else 32
        wanted = make_theirs(kind)(images(size)).logits
        torch.testing.assert_close(model(images(size)), wanted, rtol=1e-9, atol=1e-9)
    assert account.format == case.format
    names = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    used = [name for row in account.rows for name in row.names]
    assert set(used) == set(names)
    left = {name: why for name in names for start, why in case.left.items() if name.startswith(start)}
    left |= {name: COMPUTED for name in names if name.endswith(("position_index", "coords_table"))}
    assert {row.names[0]: row.how for row in account.rows if row.target is None} == left
    assert {row.target for row in account.rows if row.target and not row.names} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_several_files(tmp_path: Path, kind: str) -> None:
    make_theirs(kind).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = make_timm(kind)
    load_backbone(model, str(tmp_path / "model.safetensors.index.json"))
    torch.testing.assert_close(*features(kind, model), rtol=1e-9, atol=KINDS[kind].tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hubs_names_are_those_that_transformers_writes(tmp_path: Path, kind: str) -> None:
    """But for what it computes, and for the decoder of MAE, whose names it mixes up."""
    written = load_file(_as_saved(tmp_path, kind))
    computed = tuple(KINDS[kind].buffers) or ("-",)
    expected = {name: value for name, value in of_hub(kind).items() if not name.endswith(computed)}
    names = {name for name in {*written, *expected} if not name.startswith("decoder.")}
    assert len(names) > 20
    assert all(torch.equal(written[name], expected[name]) for name in names)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].prefix])
def test_a_tower_alone(kind: str) -> None:
    prefix = KINDS[kind].prefix
    shapes = {name: tuple(value.shape) for name, value in of_hub(kind).items()}
    alone = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    beside, found = translate(Listed(shapes), {}), translate(Listed(alone), {})
    assert found.format == KINDS[kind].format
    wanted = {
        target: tuple(name.removeprefix(prefix) for name in source.names)
        for target, source in beside.sources.items()
        if source.names[0].startswith(prefix)
    }
    assert {target: source.names for target, source in found.sources.items()} == wanted
    assert len(wanted) > 20
    assert found.unused == {
        name.removeprefix(prefix): why for name, why in beside.unused.items() if name.startswith(prefix)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_missing_is_named(kind: str) -> None:
    model = make_reference(kind)
    wanted = shapes_of(model)
    shapes = {name: tuple(value.shape) for name, value in of_hub(kind).items()}
    whole = translate(Listed(shapes), wanted)
    targets: dict[str, set[str]] = {}
    for target, source in whole.sources.items():
        for name in source.names:
            targets.setdefault(name, set()).add(target)
    recognised_by = (
        "patch_embeddings.projection.weight",
        "patch_embeddings.weight",
        "encoder.stages.0.layers.0.dwconv.weight",
        "0.blocks.0.layernorm_before.weight",
        "layer.0.attention.o_proj.weight",
    )
    needed = [name for name in targets if "classifier" not in name and not name.endswith(recognised_by)]
    assert len(needed) > 20
    for name in needed:
        rest = {other: shape for other, shape in shapes.items() if other != name}
        with pytest.raises(UserError) as caught:
            match_tensors(translate(Listed(rest), wanted), model, False)
        first = re.search(r"keys are missing \(first: \['(.+?)'\]\)", str(caught.value))
        assert first is not None and first[1] in targets[name], f"{name}: {caught.value}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", ["{}extra.weight", "{}embeddings.gate", "{}encoder.extra.bias", "extra.weight"])
def test_a_key_that_is_left_over_is_named(kind: str, extra: str) -> None:
    model, name = make_reference(kind), extra.format(KINDS[kind].prefix)
    shapes = {own_name: tuple(value.shape) for own_name, value in of_hub(kind).items()} | {name: (3,)}
    wanted = f"read as {KINDS[kind].format}'s, .* 1 are unexpected \\(first: \\['{re.escape(name)}'\\]\\)"
    with pytest.raises(UserError, match=wanted):
        match_tensors(translate(Listed(shapes), shapes_of(model)), model, False)


@pytest.mark.parametrize("kind", ["ViT", "DINOv2 giant", "Swin", "Swin V2"])
def test_a_key_of_a_layer_that_is_left_over_is_named(kind: str) -> None:
    model = make_reference(kind)
    shapes = {name: tuple(value.shape) for name, value in of_hub(kind).items()}
    for end in ("attention.gamma", "lambda_1", "output.dense.scale"):
        start = next(name for name in shapes if "encoder" in name).split("0.")[0]
        name = f"{start}0.{'blocks.1.' if 'Swin' in kind else ''}{end}"
        with pytest.raises(UserError, match=rf"1 are unexpected \(first: \['{re.escape(name)}'\]\)"):
            match_tensors(translate(Listed(shapes | {name: (3,)}), shapes_of(model)), model, False)


def test_query_key_and_value_of_other_shapes_stay() -> None:
    shapes = {name: tuple(value.shape) for name, value in of_hub("ViT").items()}
    stem = "vit.encoder.layer.1.attention.attention."
    found = translate(Listed(shapes | {f"{stem}value.weight": (24, 12)}), {})
    alone = [f"{stem}{part}.weight" for part in ("query", "key", "value")]
    assert all(found.sources[name].names == (name,) for name in alone)
    assert "blocks.1.attn.qkv.weight" not in found.sources
    assert found.sources["blocks.1.attn.qkv.bias"].names == tuple(f"{stem}{p}.bias" for p in ("query", "key", "value"))


def test_positions_are_resampled_and_the_head_is_left(tmp_path: Path) -> None:
    path = _as_published(tmp_path, "ViT")
    model = timm.create_model("vit_base_patch16_224", num_classes=3, **(VIT_OF_TIMM | {"img_size": 64}))
    load_backbone(model, str(path))
    account = WeightsFile(str(path)).check(model)
    rows = {row.target: row for row in account.rows}
    assert rows["pos_embed"].how == "resampled from 4 x 4 to 8 x 8"
    assert {row.names for row in account.rows if row.target is None} == {("classifier.weight",), ("classifier.bias",)}
    wanted = make_theirs("ViT").vit.embeddings.position_embeddings
    torch.testing.assert_close(model.pos_embed[:, 0], wanted[:, 0].float(), rtol=0, atol=0)


def test_a_dinov3_is_taken_for_no_convnext(tmp_path: Path) -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    DINOv3ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"read as Hugging Face's DINOv3's, it does not fit this backbone"):
        WeightsFile(str(tmp_path / "model.safetensors")).check(timm.create_model("vit_tiny_patch16_224"))
