"""Checkpoints of other image, patch and window sizes: what is read of them is what timm makes of the whole file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import beit, eva, swin_transformer, vision_transformer
from torch import Tensor, nn

from spt_dist import UserError
from spt_dist.models.checkpoints import WeightsFile, load_backbone
from spt_dist.models.fits import find_fit

VIT: dict[str, Any] = {"img_size": 48, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
SWIN: dict[str, Any] = {"img_size": 56, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)}
NAMES = {"vit": "vit_tiny_patch16_224", "swin": "swin_tiny_patch4_window7_224", "convnext": "convnext_atto"}


@dataclass(frozen=True)
class Case:
    """A model's file for another model of its kind, and timm's function for the whole file."""

    name: str
    source: dict[str, Any]
    target: dict[str, Any]
    reference: Callable[..., dict[str, Tensor]] = vision_transformer.checkpoint_filter_fn
    changed: set[str] = field(default_factory=lambda: {"pos_embed"})


PATCHES = {"pos_embed", "patch_embed.proj.weight"}
TABLE = "attn.relative_position_bias_table"
TABLES = {f"layers.0.blocks.0.{TABLE}", f"layers.1.blocks.0.{TABLE}", f"layers.1.blocks.1.{TABLE}"}
CASES = {
    "larger images": Case(NAMES["vit"], VIT, VIT | {"img_size": 72}),
    "smaller images": Case(NAMES["vit"], VIT, VIT | {"img_size": 24}),
    "images that are not square": Case(NAMES["vit"], VIT, VIT | {"img_size": (40, 64)}),
    # 14 x 14 patches are published, and 7 x 28 are as many.
    "as many patches": Case(
        NAMES["vit"], VIT | {"img_size": 224, "patch_size": 16}, VIT | {"img_size": (112, 448), "patch_size": 16}
    ),
    "smaller patches": Case(NAMES["vit"], VIT, VIT | {"patch_size": 6}, changed=PATCHES),
    "patches that are not square": Case(NAMES["vit"], VIT, VIT | {"patch_size": (8, 12)}, changed=PATCHES),
    "the same grid of larger patches": Case(
        NAMES["vit"], VIT, VIT | {"img_size": 60, "patch_size": 10}, changed={"patch_embed.proj.weight"}
    ),
    "no position of the class token": Case("deit3_small_patch16_224", VIT, VIT | {"img_size": 56}),
    "registers without positions": Case("vit_small_patch14_reg4_dinov2", VIT, VIT | {"img_size": 56}),
    "two tokens with positions": Case("deit_tiny_distilled_patch16_224", VIT, VIT | {"img_size": 64}),
    "no class token": Case(
        NAMES["vit"],
        VIT | {"class_token": False, "global_pool": "avg"},
        VIT | {"class_token": False, "global_pool": "avg", "img_size": 64},
    ),
    "rotary positions beside the table": Case(
        "eva02_tiny_patch14_224",
        VIT | {"img_size": 42, "patch_size": 14},
        VIT | {"img_size": 70, "patch_size": 14},
        eva.checkpoint_filter_fn,
    ),
    "BEiT's tables": Case(
        "beit_base_patch16_224",
        VIT,
        VIT | {"img_size": 64},
        beit.checkpoint_filter_fn,
        {f"blocks.0.{TABLE}"},
    ),
    "larger windows": Case(
        NAMES["swin"],
        SWIN,
        SWIN | {"img_size": 96, "window_size": 12},
        swin_transformer.checkpoint_filter_fn,
        TABLES,
    ),
    "windows that are not square": Case(
        NAMES["swin"],
        SWIN,
        SWIN | {"img_size": (80, 48), "window_size": (10, 6)},
        swin_transformer.checkpoint_filter_fn,
        TABLES,
    ),
    "Swin's patches": Case(
        NAMES["swin"],
        SWIN,
        SWIN | {"img_size": 112, "patch_size": 8},
        swin_transformer.checkpoint_filter_fn,
        {"patch_embed.proj.weight"},
    ),
}


def make(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A model with all values off their defaults."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def write(path: Path, model: nn.Module, **changes: Tensor) -> str:
    torch.save(model.state_dict() | changes, path)
    return str(path)


@pytest.mark.parametrize("kind", CASES)
def test_what_timm_makes_of_the_whole_file(tmp_path: Path, kind: str) -> None:
    case = CASES[kind]
    source, target = make(case.name, case.source), make(case.name, case.target)
    weights = WeightsFile(write(tmp_path / "source.pth", source))
    weights.check(target)
    wanted = case.reference(dict(source.state_dict()), target)
    shapes = {name: value.shape for name, value in target.state_dict().items()}
    for name in weights.taken():
        found = weights.read(name)
        assert found.shape == shapes[name], name
        assert torch.equal(found, wanted[name]), name
        assert torch.equal(weights.read_rows(name, 1, 3), found[1:3])
    values = source.state_dict()
    resampled = {name for name in weights.taken() if not torch.equal(weights.read(name), values[name])}
    assert resampled == case.changed


def test_a_grid_of_the_models_own_is_taken_as_it_is(tmp_path: Path) -> None:
    """Also if its patches could be a square: only a grid that timm publishes goes before the model's own."""
    # 2 x 8 = 4 x 4 patches; and with the class token 1 + 2 x 4 = 3 x 3.
    for width in (64, 32):
        model = make(NAMES["vit"], VIT | {"img_size": (16, width)})
        assert model.patch_embed.grid_size == (2, width // 8)
        weights = WeightsFile(write(tmp_path / "own.pth", model))
        weights.check(model)
        assert torch.equal(weights.read("pos_embed"), model.state_dict()["pos_embed"])


@pytest.mark.parametrize(("source", "target"), [(True, False), (False, True)])
def test_a_class_token_with_and_without_a_position(tmp_path: Path, source: bool, target: bool) -> None:
    """Adding nothing is having no position, and a position can be added to the token once and for all."""
    model, other = (make(NAMES["vit"], VIT | {"no_embed_class": value}) for value in (source, target))
    images = torch.randn(2, 3, 48, 48)
    load_backbone(other, write(tmp_path / "vit.pth", model))
    assert torch.allclose(other.forward_features(images), model.forward_features(images), atol=1e-5)
    # Norms do not see what is added to all channels alike.
    assert target or not other.pos_embed[:, 0].any()
    larger = make(NAMES["vit"], VIT | {"no_embed_class": target, "img_size": 64})
    same = make(NAMES["vit"], VIT | {"no_embed_class": source, "img_size": 64})
    images = torch.randn(2, 3, 64, 64)
    for each in (larger, same):
        load_backbone(each, str(tmp_path / "vit.pth"))
    assert torch.allclose(larger.forward_features(images), same.forward_features(images), atol=1e-5)


def test_a_table_of_offsets_keeps_what_is_linear_in_them(tmp_path: Path) -> None:
    """timm takes the old offsets to lie at 0, 1, 1 + q, 1 + q + q^2 ... of the new window, up to its last, 11."""
    low, high = 1.0, 2.0
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if sum(q**power for power in range(6)) < 11 else (low, q)
    outwards = torch.tensor([sum(q**power for power in range(count)) for count in range(7)], dtype=torch.float64)
    old = torch.cat([-outwards.flip(0), outwards[1:]])
    new = torch.arange(-11.0, 12.0, dtype=torch.float64)

    def plane(offsets: Tensor) -> Tensor:
        return (0.3 + 2 * offsets[:, None] - 0.7 * offsets[None, :]).flatten()[:, None]

    name = f"layers.0.blocks.0.{TABLE}"
    path = write(tmp_path / "swin.pth", make(NAMES["swin"], SWIN), **{name: plane(old).float()})
    weights = WeightsFile(path)
    weights.check(make(NAMES["swin"], SWIN | {"img_size": 96, "window_size": 12}))
    assert torch.allclose(weights.read(name).double(), plane(new), atol=1e-3)


@pytest.mark.parametrize("conv_mlp", [True, False])
def test_pointwise_convolutions_are_linear_layers(tmp_path: Path, conv_mlp: bool) -> None:
    kwargs = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    model, other = (make(NAMES["convnext"], kwargs | {"conv_mlp": value}) for value in (not conv_mlp, conv_mlp))
    load_backbone(other, write(tmp_path / "convnext.pth", model))
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(other.forward_features(images), model.forward_features(images), atol=1e-5)


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    model = make(NAMES["vit"], VIT)
    weights = WeightsFile(write(tmp_path / "half.pth", model.half()))
    weights.check(make(NAMES["vit"], VIT | {"img_size": 64, "patch_size": 4}))
    for name in PATCHES:
        assert weights.read(name).dtype == torch.float16


REFUSED: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "no square": ("vit", VIT, "pos_embed", (1, 1 + 34, 16)),
    "nothing": ("vit", VIT, "pos_embed", (1, 0, 16)),
    "another width": ("vit", VIT, "pos_embed", (1, 1 + 25, 8)),
    "two tables": ("vit", VIT, "pos_embed", (2, 1 + 25, 16)),
    "another axis": ("vit", VIT, "pos_embed", (1 + 25, 16)),
    "another number of channels": ("vit", VIT, "patch_embed.proj.weight", (16, 1, 8, 8)),
    "another width and size": ("vit", VIT, "patch_embed.proj.weight", (8, 3, 4, 4)),
    "another matrix": ("vit", VIT, "blocks.0.mlp.fc1.weight", (16, 64)),
    "another vector": ("vit", VIT, "norm.bias", (8,)),
    "a table of no window": ("swin", SWIN, f"layers.0.blocks.0.{TABLE}", (12, 1)),
    "a table of an even size": ("swin", SWIN, f"layers.0.blocks.0.{TABLE}", (144, 1)),
    "a table of other heads": ("swin", SWIN, f"layers.0.blocks.0.{TABLE}", (121, 2)),
    "an empty table": ("swin", SWIN, f"layers.0.blocks.0.{TABLE}", (0, 1)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_made_to_fit(tmp_path: Path, kind: str) -> None:
    family, kwargs, name, shape = REFUSED[kind]
    model = make(NAMES[family], kwargs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = write(tmp_path / "file.pth", make(NAMES[family], kwargs), **{name: torch.ones(shape)})
    with pytest.raises(UserError) as caught:
        load_backbone(model, path)
    own = tuple(before[name].shape)
    assert str(caught.value).startswith(f"{path}: {name} has shape {shape}, the model needs {own}; check model.name")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_how_it_is_told() -> None:
    vit = make(NAMES["vit"], VIT | {"img_size": (40, 64)})

    def words(name: str, found: tuple[int, ...], patch: tuple[int, int] | None = (8, 8)) -> str | None:
        fit = find_fit(vit, name, found, tuple(vit.state_dict()[name].shape), patch)
        return fit and fit.how

    assert words("pos_embed", (1, 1 + 36, 16)) == "resampled from 6 x 6 to 5 x 8"
    assert words("pos_embed", (1, 36, 16), None) == "resampled from 6 x 6 to 5 x 8, zeros for tokens without a patch"
    assert words("pos_embed", (1, 40, 16)) == "zeros for tokens without a patch"
    assert words("pos_embed", (1, 41, 16)) is None
    assert words("patch_embed.proj.weight", (16, 3, 16, 12)) == "resampled from 16 x 12 to 8 x 8"
    # In which order the pixels come, nobody knows.
    assert words("patch_embed.proj.weight", (16, 192)) is None
    assert words("norm.weight", (16,)) is None
