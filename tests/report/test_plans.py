"""Reports on plans: cells and pictures against counts made by hand, names of files, and what is refused."""

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from spt_dist import Plan, UserError, inject, save_delta
from spt_dist.allocation.kinds import KINDS, StructuredKind
from spt_dist.files import save_tensors
from spt_dist.report.plan_figures import draw_plan, draw_plans
from spt_dist.report.plans import read_plans, report_plans, tabulate_plans
from spt_dist.report.runs import report_on
from tests.allocation import published_files
from tests.models_for_tests import make_vit
from tests.tuning.plans_for_tests import random_plan

RANK = 3
BLOCK = {"norm1.bias": (4,), "attn.q.weight": (4, 4), "attn.v.weight": (4, 4), "mlp.fc1.weight": (10, 4)}
SHAPES: dict[str, tuple[int, ...]] = {
    "cls_token": (1, 1, 4),
    **{f"blocks.{block}.{name}": shape for block in range(12) for name, shape in BLOCK.items()},
    **{f"blocks.{block}": (4,) for block in range(12)},
    "norm.weight": (4,),
}
MATRICES = {
    "blocks.11.attn.q.weight": "lora",
    "blocks.3.mlp.fc1.weight": "adapter",
    "blocks.3.attn.v.weight": "adapter",
    "blocks.0.attn.q.weight": "scale",
    "blocks.3": "prompt",
    "blocks.10": "prompt",
}
# By the formulas of SPT's section 3.3 and its published code, of VPT, and of the kind that these tests register.
MODULE_COSTS = {
    "blocks.11.attn.q.weight": RANK * (4 + 4),
    "blocks.3.mlp.fc1.weight": RANK * 10 + RANK + 10 * RANK + 10,
    "blocks.3.attn.v.weight": RANK * 4 + RANK + 4 * RANK + 4,
    "blocks.0.attn.q.weight": 4,
    "blocks.3": RANK * 4,
    "blocks.10": RANK * 4,
}
VECTORS = ["blocks.2.norm1.bias", "blocks.10.norm1.bias", "norm.weight"]
SPARSE = {"blocks.0.mlp.fc1.weight": [0, 7, 39], "blocks.2.attn.q.weight": [5], "blocks.0.norm1.bias": [1, 2]}
NUM_TRAINABLE = sum(MODULE_COSTS.values()) + 3 * 4 + 6 + 4
# (operation, block) -> what its cell says, and how it is trained.
CELLS = {
    ("cls_token", "cls_token"): ("4", "in place"),
    ("prompt", "3"): ("r3", "prompt"),
    ("prompt", "10"): ("r3", "prompt"),
    ("norm1.bias", "0"): ("2", "single weights"),
    ("norm1.bias", "2"): ("4", "whole vectors"),
    ("norm1.bias", "10"): ("4", "whole vectors"),
    ("attn.q.weight", "0"): ("r3", "scale"),
    ("attn.q.weight", "2"): ("1", "single weights"),
    ("attn.q.weight", "11"): ("r3", "lora"),
    ("attn.v.weight", "3"): ("r3", "adapter"),
    ("mlp.fc1.weight", "0"): ("3", "single weights"),
    ("mlp.fc1.weight", "3"): ("r3", "adapter"),
    ("norm.weight", "norm"): ("4", "whole vectors"),
}


@pytest.fixture(autouse=True)
def own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that a user has registered."""
    monkeypatch.setitem(KINDS, "scale", StructuredKind(lambda shape, rank: shape[0]))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that are saved, in their order."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def save(figure: Figure, *args: object, **kwargs: object) -> None:
        saved.append(figure)
        savefig(figure, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", save)
    yield saved


def make_plan(**changes: object) -> Plan:
    """Some of everything, named in no order."""
    named = [*MATRICES, *VECTORS, *SPARSE, "cls_token"]
    plan = Plan(
        MATRICES,
        VECTORS,
        {name: torch.tensor(positions) for name, positions in SPARSE.items()},
        ["cls_token"],
        shapes={name: SHAPES[name] for name in named},
        rank=RANK,
        method="spt-mix",
        backbone_size=10_000,
    )
    for name, value in changes.items():
        setattr(plan, name, value)
    return plan


def cells_of(table: str) -> dict[str, dict[str, str]]:
    """The table at the end of a text: first cell of a row -> heading -> cell."""
    rows = [re.split(r"\s*[┃│]\s*", line)[1:-1] for line in table.splitlines() if line[:1] in ("┃", "│")]
    start = max(place for place, row in enumerate(rows) if row[0] in ("plan", "operation"))
    return {row[0]: dict(zip(rows[start], row, strict=True)) for row in rows[start + 1 :]}


def grid_of(figure: Figure) -> dict[tuple[str, str], tuple[str, str]]:
    """(operation, block) -> text and colour of the cell."""
    axes = figure.axes[0]
    colours = {(patch.get_x() + 0.5, patch.get_y() + 0.5): to_hex(patch.get_facecolor()) for patch in axes.patches}
    rows, columns = (
        [label.get_text() for label in labels] for labels in (axes.get_yticklabels(), axes.get_xticklabels())
    )
    assert len(colours) == len(axes.texts)
    return {
        (rows[int(text.get_position()[1])], columns[int(text.get_position()[0])]): (
            text.get_text(),
            colours[text.get_position()],
        )
        for text in axes.texts
    }


def legend_of(figure: Figure) -> dict[str, tuple[str, str]]:
    """Way of training -> the rest of its entry, and its colour."""
    (legend,) = figure.legends
    entries = zip(legend.get_texts(), legend.legend_handles, strict=True)
    found = {}
    for text, handle in entries:
        way, rest = re.fullmatch(r"([a-z ]+?)(?: \(|:|$)((?:.|\n)*)", text.get_text()).groups()  # type: ignore[union-attr]
        found[way] = (rest, to_hex(handle.get_facecolor()))  # type: ignore[union-attr]
    return found


def test_every_cell_of_the_picture(tmp_path: Path, figures: list[Figure]) -> None:
    draw_plan(make_plan(), tmp_path / "deeper" / "plan.png")
    (figure,) = figures
    legend = legend_of(figure)
    grid = grid_of(figure)
    assert {place: text for place, (text, _) in grid.items()} == {place: text for place, (text, _) in CELLS.items()}
    for place, (_, way) in CELLS.items():
        # Single weights are shades of one colour.
        assert way == "single weights" or grid[place][1] == legend[way][1], place
    shades = {grid[place][1] for place, (_, way) in CELLS.items() if way == "single weights"}
    assert not shades & {colour for _, colour in legend.values()}
    assert f"{NUM_TRAINABLE} trainable parameters" in figure.axes[0].get_title()
    assert f"{NUM_TRAINABLE / 10_000:.3%}" in figure.axes[0].get_title()


def test_legend_has_each_way_with_a_colour_of_its_own(tmp_path: Path, figures: list[Figure]) -> None:
    draw_plan(make_plan(), tmp_path / "plan.png")
    legend = legend_of(figures[0])
    costs: Counter[str] = Counter()
    for name, kind in MATRICES.items():
        costs[kind] += MODULE_COSTS[name]
    assert {way: int(rest.split()[-2]) for way, (rest, _) in legend.items()} == {
        **costs,
        "whole vectors": 12,
        "single weights": 6,
        "in place": 4,
    }
    assert len({colour for _, colour in legend.values()}) == len(legend) == 7
    assert legend["prompt"][0].startswith("r3): 2 modules")
    assert legend["lora"][0].startswith("r3): 1 module,")


def test_rows_and_columns_stand_in_the_order_of_the_model(tmp_path: Path, figures: list[Figure]) -> None:
    draw_plan(make_plan(), tmp_path / "plan.png")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cls_token", "0", "2", "3", "10", "11", "norm"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("cls_token", "prompt", "norm1.bias", "attn.q.weight", "attn.v.weight", "mlp.fc1.weight", "norm.weight")
    ]


def test_large_numbers_are_shortened(tmp_path: Path, figures: list[Figure]) -> None:
    sizes = {"a": 99_999, "b": 100_000, "c": 590_400, "d": 999_499, "e": 999_500, "f": 1_769_472}
    shapes = {f"blocks.0.{name}.weight": (size,) for name, size in sizes.items()}
    draw_plan(Plan(parameters=list(shapes), shapes=shapes, method="full"), tmp_path / "plan.png")
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert texts == ["99999", "100k", "590k", "999k", "1.0M", "1.8M"]


def test_comparison_picture_has_every_share(tmp_path: Path, figures: list[Figure]) -> None:
    """Shares of the two plans by block and by operation, and bars from 0 to 100."""
    shapes = {"blocks.0.q.weight": (4, 4), "blocks.1.q.weight": (4, 4), "blocks.1.v.bias": (5,), "norm.bias": (3,)}
    small = Plan(vectors=["norm.bias"], shapes=shapes)
    large = Plan(
        {"blocks.0.q.weight": "lora", "blocks.1.q.weight": "lora"},
        ["blocks.1.v.bias"],
        {"norm.bias": torch.tensor([0, 2])},
        shapes=shapes,
        rank=1,
    )
    draw_plans({"large": large, "small": small}, tmp_path / "plans.png")
    ways, blocks, operations = figures[0].axes

    def texts(axes: object) -> dict[tuple[str, str], str]:
        rows = [label.get_text() for label in axes.get_yticklabels()]  # type: ignore[attr-defined]
        plans = [label.get_text().split("\n")[0] for label in axes.get_xticklabels()]  # type: ignore[attr-defined]
        return {
            (plans[text.get_position()[0]], rows[text.get_position()[1]]): text.get_text()
            for text in axes.texts  # type: ignore[attr-defined]
        }

    # 8 + 8 in modules, 5 and 2 elsewhere.
    assert texts(blocks) == {
        ("small", "norm"): "100.0",
        ("large", "0"): f"{800 / 23:.1f}",
        ("large", "1"): f"{1300 / 23:.1f}",
        ("large", "norm"): f"{200 / 23:.1f}",
    }
    assert texts(operations) == {
        ("small", "norm.bias"): "100.0",
        ("large", "q.weight"): f"{1600 / 23:.1f}",
        ("large", "v.bias"): f"{500 / 23:.1f}",
        ("large", "norm.bias"): f"{200 / 23:.1f}",
    }
    bars = sorted((bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in ways.patches)
    wanted = [(0, 0, 100), (1, 0, 1600 / 23), (1, 1600 / 23, 500 / 23), (1, 2100 / 23, 200 / 23)]
    np.testing.assert_allclose([bar for bar in bars if bar[2]], wanted)
    assert set(legend_of(figures[0])) == {"lora", "whole vectors", "single weights"}
    assert [label.get_text() for label in ways.get_xticklabels()] == ["small\n3", "large\n23"]


def test_cells_of_the_table() -> None:
    plain = make_plan(matrices={}, method="spt", backbone_size=0)
    table = cells_of(tabulate_plans({"mixed": make_plan(), "plain": plain}))
    assert table == {
        "mixed": {
            "plan": "mixed",
            "method": "spt-mix",
            "trainable": str(NUM_TRAINABLE),
            "of backbone": f"{NUM_TRAINABLE / 10_000:.3%}",
            "adapter modules": "2 (r3)",
            "lora modules": "1 (r3)",
            "prompt modules": "2 (r3)",
            "scale modules": "1 (r3)",
            "whole vectors": "12",
            "single weights": "6",
            "in place": "4",
        },
        "plain": {
            "plan": "plain",
            "method": "spt",
            "trainable": "22",
            "of backbone": "",
            **{f"{kind} modules": "0" for kind in ("adapter", "lora", "prompt", "scale")},
            "whole vectors": "12",
            "single weights": "6",
            "in place": "4",
        },
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_table_counts_what_an_injected_model_trains(seed: int) -> None:
    plan = random_plan(make_vit(), seed, ("lora", "adapter", "prompt"))
    tuned = inject(make_vit(), plan)
    head = set(plan.head)
    trained = {name: p.numel() for name, p in tuned.named_parameters() if p.requires_grad and name not in head}
    (row,) = cells_of(tabulate_plans({"random": plan})).values()
    assert int(row["trainable"].replace(",", "")) == sum(trained.values())
    kinds = Counter(plan.matrices.values())
    assert {kind: row[f"{kind} modules"] for kind in kinds} == {kind: f"{kinds[kind]} (r2)" for kind in kinds}
    assert int(row["whole vectors"].replace(",", "")) == sum(prod(plan.shapes[name]) for name in plan.vectors)


def test_plan_files_task_files_and_published_ones_are_read(tmp_path: Path) -> None:
    plan = random_plan(make_vit(), 0)
    plan.save(tmp_path / "one.safetensors")
    save_delta(inject(make_vit(), plan), tmp_path / "two.safetensors")
    published_files.write(tmp_path / "param_req_0.4.pth", published_files.SOME.content())
    plans = read_plans([tmp_path / "two.safetensors", tmp_path / "param_req_0.4.pth", tmp_path / "one.safetensors"])
    assert list(plans) == ["two", "param_req_0.4", "one"]
    assert plans["one"].summary() == plans["two"].summary() == plan.summary()
    assert set(plans["param_req_0.4"].matrices) == set(published_files.SOME.matrix_names)


def test_names_have_as_many_folders_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / folder / "plan.safetensors" for folder in ("x/a", "y/a", "y/b")]
    for path in paths:
        make_plan().save(path)
    assert list(read_plans(paths[:1])) == ["plan"]
    assert list(read_plans(paths[1:])) == ["a_plan", "b_plan"]
    assert list(read_plans(paths)) == ["x_a_plan", "y_a_plan", "y_b_plan"]
    monkeypatch.chdir(tmp_path / "y")
    with pytest.raises(UserError, match=r"y/a/plan\.safetensors and \.\./y/a/plan\.safetensors: .*one at a time"):
        read_plans([paths[1], paths[2], Path("../y/a/plan.safetensors")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.safetensors", r"missing\.safetensors: no such file; expected a plan file"),
        ("scores.safetensors", r"scores\.safetensors: this is a scores file, not a plan file"),
        ("broken.safetensors", r"broken\.safetensors: not a readable safetensors file .* may be truncated"),
        ("missing.pth", r"missing\.pth: no such file; expected an allocation published with SPT"),
        (
            "notes.txt",
            r"notes\.txt holds no finished run .* and is no plan file \(\*\.safetensors, \*\.pth\)",
        ),
        ("unknown.safetensors", r"structured='other': no such kind of module"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, name: str, message: str) -> None:
    save_tensors(tmp_path / "scores.safetensors", {"scores": torch.zeros(2)}, {"kind": "scores"})
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    (tmp_path / "notes.txt").write_text("no plan")
    make_plan(matrices={"blocks.3.attn.v.weight": "other"}).save(tmp_path / "unknown.safetensors")
    with pytest.raises(UserError, match=message):
        report_on([tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_report_on_one_plan(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "mine.safetensors")
    text, files = report_on([tmp_path / "mine.safetensors"], tmp_path / "out")
    assert text == make_plan().summary()
    assert {path.name for path in files.values()} == {"report.txt", "plan.png"}
    check_files(tmp_path / "out", text, files)


def test_report_on_several_plans(tmp_path: Path) -> None:
    plans = {"budget_10": make_plan(), "budget_0.5": make_plan(sparse={})}
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.safetensors")
    text, files = report_on([tmp_path / f"{name}.safetensors" for name in plans], tmp_path / "out")
    for name, plan in plans.items():
        assert f"{name}: {plan.summary()}" in text
    assert text.endswith(tabulate_plans(plans))
    assert {path.name for path in files.values()} == {
        *("report.txt", "plan_budget_10.png", "plan_budget_0.5.png", "plans.png")
    }
    check_files(tmp_path / "out", text, files)


def check_files(out: Path, text: str, files: dict[str, Path]) -> None:
    """All files of a report are named, the table is the text, and the pictures show something."""
    assert set(files.values()) == set(out.iterdir())
    assert (out / "report.txt").read_text(encoding="utf-8") == text + "\n"
    for path in out.glob("*.png"):
        pixels_HWC = imread(path)[..., :3]
        assert min(pixels_HWC.shape[:2]) > 200
        assert len(np.unique(pixels_HWC.reshape(-1, 3), axis=0)) > 10


def test_plans_of_the_head_alone(tmp_path: Path) -> None:
    """There is something to see, and nothing to compare."""
    plans = {name: Plan(head=["head.weight"], method="linear", backbone_size=100) for name in "ab"}
    text, files = report_plans(plans, tmp_path)
    assert (
        {path.name for path in files.values()} == {"plan_a.png", "plan_b.png"} == {p.name for p in tmp_path.iterdir()}
    )
    assert [row["trainable"] for row in cells_of(text).values()] == ["0", "0"]
