"""The table of a checkpoint: every tensor of the file and of the model is in it, and it fits on a screen."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from spt_dist.models.accounts import Account, Row
from spt_dist.models.checkpoints import WeightsFile

DEEP: dict[str, Any] = {"patch_size": 16, "embed_dim": 12, "depth": 12, "num_heads": 2}
VIT, SWIN, CONVNEXT = "vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base"
SWIN_KWARGS: dict[str, Any] = {"embed_dim": 8, "num_heads": (1, 2, 4, 8)}
DIMS: dict[str, Any] = {"dims": (8, 16, 24, 32)}
State = dict[str, Tensor]


def state_of(name: str, num_classes: int, kwargs: dict[str, Any]) -> State:
    return dict(timm.create_model(name, num_classes=num_classes, **kwargs).state_dict())


def of_mae() -> State:
    decoder = {f"decoder_blocks.{block}.norm1.{own}": torch.ones(4) for block in range(8) for own in ("weight", "bias")}
    token = {"mask_token": torch.ones(1, 1, 4), "decoder_pos_embed": torch.ones(1, 197, 4)}
    return state_of(VIT, 0, DEEP) | token | decoder


def of_early_swin() -> State:
    """As it was published: it merges patches at the end of a stage."""
    found = {}
    for name, value in state_of(SWIN, 9, SWIN_KWARGS).items():
        stage, _, own = name.removeprefix("layers.").partition(".")
        if own.startswith("downsample"):
            name = f"layers.{int(stage) - 1}.{own}"
        found[name.replace("head.fc", "head")] = value
    return found | {f"layers.{stage}.blocks.0.attn.relative_position_index": torch.zeros(49, 49) for stage in range(4)}


def of_moco() -> State:
    """Its encoder has DistributedDataParallel's name before it, and another one beside it."""
    state = {f"module.base_encoder.{name}": value for name, value in state_of(VIT, 0, DEEP).items()}
    other = {name.replace("base", "momentum"): value for name, value in state.items()}
    return state | other | {"module.predictor.0.weight": torch.ones(2, 2)}


FILES: dict[str, tuple[State, str, dict[str, Any], bool]] = {
    "timm": (state_of(VIT, 9, DEEP), VIT, DEEP, False),
    "a head that is kept": (state_of(VIT, 5, DEEP), VIT, DEEP, True),
    "larger images": (state_of(VIT, 9, DEEP), VIT, DEEP | {"img_size": 384, "patch_size": 8}, False),
    "MAE": (of_mae(), VIT, DEEP, False),
    "MAE, mean of tokens": (of_mae(), VIT, DEEP | {"global_pool": "avg"}, False),
    "MoCo": (of_moco(), VIT, DEEP, False),
    "a position added to the token": (state_of(VIT, 9, DEEP), VIT, DEEP | {"no_embed_class": True}, False),
    "Swin": (of_early_swin(), SWIN, SWIN_KWARGS | {"img_size": 384, "window_size": 12}, False),
    "ConvNeXt": (state_of(CONVNEXT, 9, DIMS), CONVNEXT, DIMS | {"conv_mlp": True}, False),
}


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Account]:
    """Of each of the files for its model of 5 classes."""
    found = {}
    path = tmp_path_factory.mktemp("accounts") / "weights.pth"
    for kind, (state, name, kwargs, keep_head) in FILES.items():
        torch.save(state, path)
        model = timm.create_model(name, num_classes=5, **kwargs)
        found[kind] = WeightsFile(str(path)).check(model, keep_head)
    return found


@pytest.mark.parametrize("kind", FILES)
def test_every_tensor_is_accounted_for(kind: str, accounts: dict[str, Account]) -> None:
    state, name, kwargs, keep_head = FILES[kind]
    rows = accounts[kind].rows
    model = timm.create_model(name, num_classes=5, **kwargs)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {row.target: row.wanted for row in rows if row.target is not None} == wanted
    assert len([row for row in rows if row.target is not None]) == len(wanted)
    taken = {key for row in rows if row.target is not None for key in row.names}
    left = [key for row in rows if row.target is None for key in row.names]
    assert len(left) == len(set(left)) and not taken & set(left)
    assert taken | set(left) == set(state)
    assert all(row.found == tuple(tuple(state[key].shape) for key in row.names) for row in rows)
    assert all(row.how for row in rows if row.target is None or row.found != (row.wanted,))
    fresh = {row.target for row in rows if not row.names}
    heads = {key for key in wanted if key.startswith(("head.weight", "head.bias", "head.fc."))}
    assert fresh == (set() if keep_head else heads) | {key for key in wanted if key.startswith("fc_norm")}


@pytest.mark.parametrize("kind", FILES)
def test_it_fits_on_a_screen(kind: str, accounts: dict[str, Account]) -> None:
    lines = accounts[kind].table().splitlines()
    assert len(lines) <= 36
    assert max(map(len, lines)) <= 190
    assert all("│" not in line or line.count("│") == 6 for line in lines)


def cells(account: Account) -> list[list[str]]:
    """The table's lines: name in the file, number, name, shape, remark."""
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in account.table().splitlines()
        if line.startswith("│")
    ]


def test_what_differs_in_its_block_alone_is_one_line(accounts: dict[str, Account]) -> None:
    account = accounts["larger images"]
    title, summary = account.table().splitlines()[:2]
    assert title == f"{account.path}: 152 tensors, format timm, 2 left out"
    assert summary == (
        "under timm's names 152 tensors: 148 taken as they are, 2 changed on the way, 2 not from the file"
    )
    found = cells(account)
    assert ["blocks.*.attn.qkv.weight", "12", "same", "36 x 12", ""] in found
    assert ["norm.bias", "1", "same", "12", ""] in found
    words = "resampled from 14 x 14 to 48 x 48"
    assert ["pos_embed", "1", "same", "1 x 197 x 12 -> 1 x 2305 x 12", words] in found
    assert ["", "1", "head.weight", "5 x 12", "not from the file"] in found
    assert ["head.weight, ...", "2", "", "9 x 12, ...", "head; model.keep_head=True takes it"] in found
    assert sum(int(line[1]) for line in found) == 152 + 2


def test_what_is_made_of_several_tensors_and_what_has_another_number(accounts: dict[str, Account]) -> None:
    found = cells(accounts["a position added to the token"])
    words = "class position added to the token"
    assert ["{cls_token,pos_embed}", "1", "cls_token", "1 x 1 x 12, 1 x 197 x 12 -> 1 x 1 x 12", words] in found
    assert any(line[0] == "pos_embed" and line[3] == "1 x 197 x 12 -> 1 x 196 x 12" for line in found)
    swin = cells(accounts["Swin"])
    assert any(
        line[:3] == ["layers.0.downsample.norm.bias, ...", "3", "layers.1.downsample.norm.bias, ..."] for line in swin
    )
    words = "resampled from 13 x 13 to 23 x 23"
    table = "layers.*.blocks.*.attn.relative_position_bias_table"
    assert [table, "24", "same", "169 x 1 -> 529 x 1, ...", words] in swin
    # Layers that have nothing but their place in common are not one.
    assert ["stem.0.weight", "1", "same", "8 x 3 x 4 x 4", ""] in cells(accounts["ConvNeXt"])
    decoder = [line for line in cells(accounts["MAE"]) if line[4] == "decoder of MAE"]
    assert [(line[1], line[2]) for line in decoder] == [("17", "")]


def test_a_norm_that_starts_anew_is_told(accounts: dict[str, Account]) -> None:
    found = cells(accounts["MAE, mean of tokens"])
    assert ["", "1", "fc_norm.weight", "12", "starts at 1"] in found
    assert ["", "1", "fc_norm.bias", "12", "starts at 0"] in found
    assert any(line[0] == "norm.weight, ..." and line[1] == "2" and "fc_norm" in line[4] for line in found)


def test_parts_that_are_joined() -> None:
    rows = tuple(
        Row(
            tuple(f"encoder.layer.{block}.attention.{part}.bias" for part in ("query", "key", "value")),
            ((4,), (4,), (4,)),
            f"blocks.{block}.attn.qkv.bias",
            (12,),
            "q, k, v joined",
        )
        for block in range(11)
    )
    (line,) = cells(Account(Path("file"), "some", rows))
    names = "encoder.layer.*.attention.{query,key,value}.bias"
    assert line == [names, "11", "blocks.*.attn.qkv.bias", "3 of 4 -> 12", "q, k, v joined"]


def test_a_file_without_a_model(tmp_path: Path) -> None:
    torch.save(of_mae(), tmp_path / "mae.pth")
    weights = WeightsFile(str(tmp_path / "mae.pth"))
    found = cells(weights.survey())
    assert ["blocks.*.mlp.fc2.bias", "12", "same", "12", ""] in found
    assert sum(int(line[1]) for line in found) == len(of_mae())
    assert weights.read("blocks.3.norm1.weight").shape == (12,)
