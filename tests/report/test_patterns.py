"""Sensitivity patterns against a plain sort, on any number of ranks, and their files."""

import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from torch import Tensor

from spt_dist import Scores, UserError, allocate
from spt_dist.report.figures import draw_block_patterns, draw_densities, draw_operation_patterns
from spt_dist.report.patterns import TAUS, find_patterns, mean_scores, parse_taus, resolve_taus
from spt_dist.report.runs import report_on
from spt_dist.report.stage_one import report_scores
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, shard_bounds
from tests.ranks import run_ranks
from tests.scores_for_tests import make_info

Shapes = dict[str, tuple[int, ...]]

BLOCK: Shapes = {"norm1.weight": (4,), "attn.q.weight": (4, 4), "attn.q.bias": (4,), "mlp.fc1.weight": (8, 4)}
VIT: Shapes = {
    "cls_token": (1, 1, 4),
    "pos_embed": (1, 5, 4),
    "patch_embed.proj.weight": (4, 3, 2, 2),
    **{f"blocks.{block}.{name}": shape for block in range(12) for name, shape in BLOCK.items()},
    "norm.weight": (4,),
}
SWIN: Shapes = {
    "patch_embed.proj.weight": (4, 3, 2, 2),
    **{f"layers.0.blocks.{block}.{name}": shape for block in range(2) for name, shape in BLOCK.items()},
    "layers.1.downsample.reduction.weight": (4, 8),
    **{f"layers.1.blocks.{block}.{name}": shape for block in range(30) for name, shape in BLOCK.items()},
    "norm.weight": (4,),
}
CONVNEXT: Shapes = {
    "stem.0.weight": (4, 3, 2, 2),
    **{f"stages.0.blocks.{block}.conv_dw.weight": (4, 1, 3, 3) for block in range(3)},
    "stages.1.downsample.0.weight": (4,),
    "stages.1.downsample.1.weight": (8, 4, 2, 2),
    **{f"stages.1.blocks.{block}.conv_dw.weight": (8, 1, 3, 3) for block in range(3)},
}
BACKBONES = {"vit": VIT, "swin": SWIN, "convnext": CONVNEXT}
TAUS_HERE = (1, 20, 0.5, 1.0)


def draw_values(shapes: Shapes, seed: int = 0) -> Tensor:
    """Random scores of few different values, so that some are equal wherever the threshold falls."""
    torch.manual_seed(seed)
    return torch.randint(0, 30, (sum(map(prod, shapes.values())),)).float()


def make_scores(shapes: Shapes, values: Tensor) -> Scores:
    """Scores whose parts are spread over the ranks there are; ``cls_token`` is always tuned."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    index = FlatIndex(tuple(shapes), tuple(shapes.values()))
    start, stop = shard_bounds(index.total, size, rank)
    always = {name: list(shape) for name, shape in shapes.items() if name == "cls_token"}
    info = make_info(head=[], always_tuned=always, backbone_size=index.total)
    return Scores(ScoreShard(index, start, values[start:stop].clone()), info)


def count_by_sorting(shapes: Shapes, values: Tensor, tau: int | float) -> dict[str, int]:
    """Name -> how many of the highest scores it has, the first of equal ones counting as higher; no ``cls_token``."""
    owners = np.repeat(list(shapes), [prod(shape) for shape in shapes.values()])
    keep = owners != "cls_token"
    owners, competing = owners[keep], values.numpy()[keep]
    number = max(1, round(tau * len(owners))) if isinstance(tau, float) else tau
    return Counter(owners[np.argsort(-competing, kind="stable")[:number]].tolist())


def counts_on_ranks(backbone: str) -> Any:
    """Patterns and means from several ranks, in plain types."""
    shapes = BACKBONES[backbone]
    scores = make_scores(shapes, draw_values(shapes))
    patterns = find_patterns(scores, TAUS_HERE)
    return patterns.taus, patterns.names, patterns.sizes.tolist(), patterns.counts.tolist(), mean_scores(scores)


def report_on_ranks(folder: str) -> list[str]:
    """Write the report from several ranks; the files it names."""
    patterns, files = report_scores(make_scores(VIT, draw_values(VIT)), folder, TAUS_HERE, suffix="_own")
    dist.barrier()
    assert all(path.is_file() for path in files.values())
    assert len(patterns.taus) == len(TAUS_HERE)
    return [path.name for path in files.values()]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(BACKBONES)),
    st.lists(st.one_of(st.integers(1, 200), st.floats(1e-9, 1.0)), min_size=1, max_size=4),
    st.integers(0, 1000),
)
def test_counts_are_those_of_a_sort(backbone: str, taus: list[int | float], seed: int) -> None:
    shapes = BACKBONES[backbone]
    values = draw_values(shapes, seed)
    patterns = find_patterns(make_scores(shapes, values), taus)
    wanted = {sum(counts.values()): counts for counts in (count_by_sorting(shapes, values, tau) for tau in taus)}
    assert patterns.taus == tuple(sorted(wanted))
    for tau, counts in zip(patterns.taus, patterns.counts, strict=True):
        assert {name: count for name, count in zip(patterns.names, counts, strict=True) if count} == wanted[tau]


def test_without_ties_topk_agrees() -> None:
    values = torch.randperm(sum(map(prod, SWIN.values()))).float()
    (counts,) = find_patterns(make_scores(SWIN, values), [100]).counts
    top = torch.zeros(len(values)).index_fill(0, values.topk(100).indices, 1)
    assert counts.tolist() == [int(part.sum()) for part in top.split([prod(shape) for shape in SWIN.values()])]


def test_they_are_the_weights_that_allocate_chooses() -> None:
    scores = make_scores(VIT, draw_values(VIT))
    plan = allocate(scores, tau=40, structured=None)
    patterns = find_patterns(scores, [40])
    counts = {name: count for name, count in zip(patterns.names, patterns.counts[0], strict=True) if count}
    assert counts == {name: len(indices) for name, indices in plan.sparse.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("backbone", ["vit", "convnext"])
def test_every_number_of_ranks_finds_the_same(backbone: str) -> None:
    shapes = BACKBONES[backbone]
    values = draw_values(shapes)
    parts = values.split([prod(shape) for shape in shapes.values()])
    one = run_ranks(counts_on_ranks, 1, backbone)[0]
    assert one[4] == pytest.approx({name: float(part.mean()) for name, part in zip(shapes, parts, strict=True)})
    for world_size in (2, 4):
        for found in run_ranks(counts_on_ranks, world_size, backbone):
            assert found[:4] == one[:4]
            assert found[4] == pytest.approx(one[4])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_sums_by_block_and_by_operation(backbone: str) -> None:
    """Nothing is lost or counted twice: blocks and operations share out the sensitive weights."""
    shapes = BACKBONES[backbone]
    patterns = find_patterns(make_scores(shapes, draw_values(shapes)), TAUS_HERE)
    for weights, sensitive in (patterns.by_block(), patterns.by_operation()):
        assert weights.sum() == patterns.num_weights == sum(map(prod, shapes.values())) - 4 * ("cls_token" in shapes)
        np.testing.assert_array_equal(sensitive.sum(axis=1), patterns.taus)
        np.testing.assert_array_equal(sensitive[-1], weights)  # the last tau takes all


def test_a_pattern_worked_out_by_hand() -> None:
    shapes: Shapes = {"stem.weight": (4,), "layers.0.blocks.0.fc.weight": (2, 2), "layers.0.blocks.0.fc.bias": (2,)}
    shapes |= {"layers.1.downsample.weight": (3,), "layers.1.blocks.0.fc.weight": (2, 4)}
    values = [0, 0, 0, 9, 8, 7, 0, 0, 9, 0, 0, 0, 0, 8, 8, 8, 0, 0, 0, 0, 0]
    patterns = find_patterns(make_scores(shapes, torch.tensor(values).float()), [7])
    assert patterns.layout.columns == ["stem", "0.0", "1.downsample", "1.0"]
    assert patterns.layout.operations == ["stem.weight", "fc.weight", "fc.bias", "downsample.weight"]
    weights, sensitive = patterns.by_block()
    assert weights.tolist() == [4, 6, 3, 8]
    assert sensitive.tolist() == [[1, 3, 0, 3]]
    weights, sensitive = patterns.by_operation()
    assert weights.tolist() == [4, 12, 2, 3]
    assert sensitive.tolist() == [[1, 5, 1, 0]]
    nan = np.nan
    by_hand = [[0.25, nan, nan, nan], [nan, 0.5, nan, 3 / 8], [nan, 0.5, nan, nan], [nan, nan, 0, nan]]
    np.testing.assert_array_equal(patterns.densities(), [by_hand])
    (row,) = [line for line in patterns.table().splitlines() if "fc.weight" in line]
    assert re.findall(r"\d[\d.]*%?", row) == ["12", "57.14%", "71.43%"]
    assert "of top 33.3%" in patterns.table()


def test_saved_patterns_are_plain_json(tmp_path: Path) -> None:
    values = draw_values(SWIN)
    find_patterns(make_scores(SWIN, values), [10, 0.5]).save(tmp_path / "deeper" / "patterns.json")
    saved = json.loads((tmp_path / "deeper" / "patterns.json").read_text(encoding="utf-8"))
    assert saved["taus"] == [10, round(sum(map(prod, SWIN.values())) / 2)]
    tensors = {tensor["name"]: tensor for tensor in saved["tensors"]}
    assert {name: tensor["weights"] for name, tensor in tensors.items()} == {n: prod(s) for n, s in SWIN.items()}
    wanted = count_by_sorting(SWIN, values, 10)
    assert {name: tensor["sensitive"][0] for name, tensor in tensors.items()} == {name: wanted[name] for name in SWIN}
    assert tensors["layers.1.blocks.29.attn.q.bias"]["block"] == "1.29"
    assert tensors["layers.1.blocks.29.attn.q.bias"]["operation"] == "attn.q.bias"


@pytest.mark.parametrize(
    ("backbone", "taus"), [("vit", TAUS_HERE), ("swin", [0.01, 0.1]), ("convnext", [1])], ids=BACKBONES
)
def test_pictures_show_something(tmp_path: Path, backbone: str, taus: list[int | float]) -> None:
    shapes = BACKBONES[backbone]
    patterns = find_patterns(make_scores(shapes, draw_values(shapes)), taus)
    for draw in (draw_block_patterns, draw_operation_patterns, draw_densities):
        pixels_HWC = imread(draw(patterns, tmp_path / "deeper" / "picture.png"))[..., :3]
        assert min(pixels_HWC.shape[:2]) > 200
        assert len(np.unique(pixels_HWC.reshape(-1, 3), axis=0)) > 10


@pytest.mark.distributed
def test_report_from_several_ranks(tmp_path: Path) -> None:
    for names in run_ranks(report_on_ranks, 2, str(tmp_path)):
        assert set(names) == {path.name for path in tmp_path.iterdir()}
        assert all("_own." in name for name in names)


def test_report_on_saved_scores(tmp_path: Path) -> None:
    scores = {"vit": make_scores(VIT, draw_values(VIT)), "swin": make_scores(SWIN, draw_values(SWIN))}
    for name, some in scores.items():
        some.save(tmp_path / name)
    text, files = report_on([tmp_path / "vit", tmp_path / "swin"], tmp_path / "out", [7])
    for name, some in scores.items():
        assert f"{name}: {find_patterns(some, [7]).table()}" in text
        kinds = ("scores{}.png", "patterns{}.json", *(f"patterns_{what}{{}}.png" for what in ("blocks", "operations")))
        assert {tmp_path / "out" / kind.format(f"_{name}") for kind in kinds} <= set(files.values())
    assert (tmp_path / "out" / "report.txt").read_text(encoding="utf-8") == text + "\n"
    assert all(path.is_file() for path in files.values())


def test_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    for place in ("a", "b"):
        make_scores(VIT, draw_values(VIT)).save(tmp_path / place / "scores")
    with pytest.raises(UserError, match=r"a/scores and .*b/scores: their pictures would have the same names"):
        report_on([tmp_path / "a" / "scores", tmp_path / "b" / "scores"], tmp_path / "out")


def test_typed_taus() -> None:
    assert parse_taus(None) == TAUS
    assert [(tau, type(tau)) for tau in parse_taus(["1", "1.0", "1e-3"])] == [(1, int), (1.0, float), (0.001, float)]
    with pytest.raises(UserError, match=r"tau=0\.1 few: a tau is a number"):
        parse_taus(["0.1", "few"])


def test_taus_are_counts_or_fractions() -> None:
    assert resolve_taus([0.5, 3, 1.0, 1e-9, 1], 10) == (1, 3, 5, 10)


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (0, "tau=0: has to lie between 1 and the 1,000 weights"),
        (1001, "tau=1001: has to lie"),
        (0.0, "tau=0.0: a fraction lies between 0 and 1"),
        (-0.5, "a fraction"),
        (1.5, "tau=1.5: a fraction"),
        (float("nan"), "tau=nan"),
        (float("inf"), "tau=inf"),
    ],
)
def test_bad_taus_are_refused(tau: int | float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_taus([0.5, tau], 1000)
