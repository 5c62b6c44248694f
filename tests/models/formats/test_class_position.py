"""Class tokens with and without a position."""

from pathlib import Path

import pytest
import torch

from tests.models.formats.published import images, load, randomised
from tests.models_for_tests import make_vit


@pytest.mark.parametrize("size", [24, 32])
def test_a_model_without_a_position_for_its_class_token_computes_the_same(tmp_path: Path, size: int) -> None:
    theirs = randomised(make_vit(img_size=size))
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    model, translation = load(
        make_vit(1, img_size=size, no_embed_class=True), tmp_path / "vit.pth", has_class_position=False
    )
    torch.testing.assert_close(model(images(size)), theirs(images(size)), rtol=1e-9, atol=1e-9)
    assert translation.sources["cls_token"].names == ("cls_token", "pos_embed")
    assert translation.sources["pos_embed"].how == "without the class position"
    # Its own file has nothing to be added.
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    again, translation = load(
        make_vit(2, img_size=size, no_embed_class=True), tmp_path / "vit.pth", has_class_position=False
    )
    assert translation.sources["cls_token"].how == ""
    assert torch.equal(again(images(size)), model(images(size)))


def test_positions_of_another_grid_lose_the_row_too(tmp_path: Path) -> None:
    theirs = make_vit(img_size=40)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        load(make_vit(no_embed_class=True), tmp_path / "vit.pth", has_class_position=False)
    model = make_vit(img_size=40, no_embed_class=True, dynamic_img_size=True)
    load(model, tmp_path / "vit.pth", has_class_position=False)
    assert torch.equal(model.get_parameter("pos_embed").float(), theirs.get_parameter("pos_embed")[:, 1:])


def test_a_model_with_the_position_keeps_it(tmp_path: Path) -> None:
    theirs = make_vit(img_size=40).state_dict()
    torch.save(theirs, tmp_path / "vit.pth")
    model, translation = load(make_vit(1, img_size=40), tmp_path / "vit.pth")
    assert torch.equal(model.get_parameter("pos_embed").float(), theirs["pos_embed"])
    assert all(source.make is None for source in translation.sources.values())


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_a_model_without_a_class_token(tmp_path: Path, no_embed_class: bool) -> None:
    theirs = make_vit(no_embed_class=no_embed_class).state_dict()
    torch.save(theirs, tmp_path / "vit.pth")
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    model, translation = load(make_vit(1, **options), tmp_path / "vit.pth")
    patches = theirs["pos_embed"] if no_embed_class else theirs["pos_embed"][:, 1:]
    assert torch.equal(model.get_parameter("pos_embed").float(), patches)
    assert translation.unused == {"cls_token": "the model has no class token"}


def test_a_rectangular_grid_of_the_models_own_stays(tmp_path: Path) -> None:
    options = {"img_size": (16, 40), "no_embed_class": True}
    theirs = make_vit(**options).state_dict()
    torch.save(theirs, tmp_path / "vit.pth")
    model, translation = load(make_vit(1, **options), tmp_path / "vit.pth", has_class_position=False)
    assert all(torch.equal(value.float(), theirs[name]) for name, value in model.state_dict().items())
    assert all(source.make is None for source in translation.sources.values())


def test_registers_of_a_plain_vit_stay(tmp_path: Path) -> None:
    options = {"reg_tokens": 4, "no_embed_class": True}
    theirs = make_vit(**options).state_dict()
    torch.save(theirs, tmp_path / "vit.pth")
    model, translation = load(make_vit(1, **options), tmp_path / "vit.pth")
    assert all(torch.equal(value.float(), theirs[name]) for name, value in model.state_dict().items())
    assert (translation.format, translation.unused) == ("timm", {})
