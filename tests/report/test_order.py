"""The usual order of rows and columns, found from names in any order, against that of the models themselves."""

import random
from itertools import pairwise

# Must come before timm: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # noqa: F401  # isort: skip

import numpy as np
import pytest
import timm

from spt_dist.models.matrices import take_inventory
from spt_dist.report.grid import find_places, lay_out
from spt_dist.report.order import lay_out_some
from tests.tuning.plans_for_tests import MODELS, make_model

VIT_ROWS = [
    *("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
    *("norm1.weight", "norm1.bias"),
    *(f"attn.{name}.{what}" for name in ("q", "k", "v", "proj") for what in ("weight", "bias")),
    *("ls1.gamma", "norm2.weight", "norm2.bias"),
    *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    *("ls2.gamma", "norm.weight", "norm.bias"),
]


def names_of(kind: str) -> list[str]:
    """Logical names in the model's order, of a small model or an architecture of timm's."""
    model = make_model(kind) if kind in MODELS else timm.create_model(kind)
    return [parameter.name for parameter in take_inventory(model).parameters]


@pytest.mark.parametrize("kind", [*MODELS, "cait_xxs24_224"])
def test_columns_are_the_models(kind: str) -> None:
    names = names_of(kind)
    wanted = lay_out(names).columns
    shuffled = random.Random(0).sample(names, len(names))
    assert lay_out_some(shuffled).columns == wanted
    assert lay_out_some(shuffled).is_block == lay_out(names).is_block


def test_rows_of_a_vit() -> None:
    names = names_of("registers, layer scale")
    for seed in range(5):
        assert lay_out_some(random.Random(seed).sample(names, len(names))).operations == VIT_ROWS
    some = random.Random(1).sample(names, len(names) // 4)
    operations = {place.operation for place in find_places(some)}
    assert lay_out_some(some).operations == [row for row in VIT_ROWS if row in operations]


@pytest.mark.parametrize("kind", ["windows", "convolutions"])
def test_rows_keep_together_what_belongs_together(kind: str) -> None:
    """First what comes before the blocks, then the blocks' operations, then the rest; a bias follows its weight."""
    names = random.Random(0).sample(names_of(kind), len(names_of(kind)))
    rows = lay_out_some(names).operations
    kinds = {place.operation: place.block is not None for place in find_places(names)}
    flags = [kinds[row] for row in rows]
    assert flags[0] is flags[-1] is False
    assert sum(first != second for first, second in pairwise(flags)) == 2
    for row in rows:
        if row.endswith(".bias"):
            assert rows[rows.index(row) - 1] == row.removesuffix("bias") + "weight"


def test_every_name_keeps_its_place() -> None:
    names = random.Random(0).sample(names_of("windows"), 20)
    layout = lay_out_some(names)
    places = [(layout.operations[row], layout.columns[col]) for row, col in zip(layout.rows, layout.cols, strict=True)]
    assert places == [(place.operation, place.column) for place in find_places(names)]


def test_nothing_makes_an_empty_grid() -> None:
    layout = lay_out_some([])
    assert (layout.operations, layout.columns, layout.is_block) == ([], [], [])
    assert np.array_equal(layout.rows, layout.cols)
