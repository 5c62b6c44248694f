"""Scores and plans as grids, and their pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from spt_dist import Plan
from spt_dist.report.figures import draw_losses, draw_plan, draw_scores
from spt_dist.report.grid import to_grid


def test_values_fall_into_blocks_and_operations() -> None:
    values = {"blocks.0.a.weight": 1.0, "blocks.10.a.weight": 2.0, "blocks.2.b.bias": 3.0, "norm.bias": 4.0}
    grid, operations, columns = to_grid(values)
    assert operations == ["a.weight", "b.bias", "norm.bias"]
    assert columns == ["0", "2", "10", "rest"]
    nan = np.nan
    np.testing.assert_array_equal(grid, [[1, nan, 2, nan], [nan, 3, nan, nan], [nan, nan, nan, 4]])


@pytest.mark.parametrize("kind", ["scores", "plan", "losses"])
def test_pictures_show_something(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "deeper" / "picture.png"
    if kind == "scores":
        draw_scores({f"blocks.{i}.{op}.weight": 10.0**i for i in range(3) for op in "ab"} | {"norm.bias": 0.0}, path)
    elif kind == "plan":
        shapes = {"blocks.0.q.weight": (4, 4), "blocks.1.q.weight": (4, 4), "blocks.1.q.bias": (4,)}
        sparse = {"blocks.1.q.weight": torch.tensor([1, 5])}
        draw_plan(Plan({"blocks.0.q.weight": "lora"}, ["blocks.1.q.bias"], sparse, shapes=shapes, rank=1), path)
    else:
        draw_losses({"one": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "top1": 0.5}]}, path)
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
