"""Weights as grids, and pictures of scores and losses."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from spt_dist.report.figures import draw_losses, draw_scores
from spt_dist.report.grid import lay_out, to_grid


def test_values_fall_into_blocks_and_operations() -> None:
    values = {"blocks.0.a.weight": 1.0, "blocks.10.a.weight": 2.0, "blocks.2.b.bias": 3.0, "norm.bias": 4.0}
    grid, operations, columns = to_grid(values)
    assert operations == ["a.weight", "b.bias", "norm.bias"]
    assert columns == ["0", "2", "10", "norm"]
    nan = np.nan
    np.testing.assert_array_equal(grid, [[1, nan, 2, nan], [nan, 3, nan, nan], [nan, nan, nan, 4]])


# Name -> operation, column, whether that is a block; in the order of a model's parameters.
BACKBONES = {
    "vit": {
        "cls_token": ("cls_token", "cls_token", False),
        "pos_embed": ("pos_embed", "pos_embed", False),
        "patch_embed.proj.weight": ("patch_embed.proj.weight", "patch_embed", False),
        "blocks.0.attn.q.weight": ("attn.q.weight", "0", True),
        "blocks.0.ls1.gamma": ("ls1.gamma", "0", True),
        "blocks.11.attn.q.weight": ("attn.q.weight", "11", True),
        "norm.bias": ("norm.bias", "norm", False),
    },
    "swin": {
        "patch_embed.norm.weight": ("patch_embed.norm.weight", "patch_embed", False),
        "layers.0.blocks.1.attn.relative_position_bias_table": ("attn.relative_position_bias_table", "0.1", True),
        "layers.0.blocks.1.attn.cpb_mlp.0.weight": ("attn.cpb_mlp.0.weight", "0.1", True),
        "layers.1.downsample.reduction.weight": ("downsample.reduction.weight", "1.downsample", False),
        "layers.1.blocks.0.attn.q.weight": ("attn.q.weight", "1.0", True),
        "layers.2.downsample.reduction.weight": ("downsample.reduction.weight", "2.downsample", False),
        "layers.2.blocks.15.attn.q.weight": ("attn.q.weight", "2.15", True),
        "norm.weight": ("norm.weight", "norm", False),
    },
    "convnext in a segmenter": {
        "backbone.stem.0.weight": ("stem.0.weight", "stem", False),
        "backbone.stages.0.blocks.0.gamma": ("gamma", "0.0", True),
        "backbone.stages.0.blocks.0.norm.weight": ("norm.weight", "0.0", True),
        "backbone.stages.1.downsample.1.weight": ("downsample.1.weight", "1.downsample", False),
        "backbone.stages.1.blocks.4.conv_dw.weight": ("conv_dw.weight", "1.4", True),
        # Not the blocks' own norm.
        "backbone.norm.weight": ("norm.weight (outside blocks)", "norm", False),
    },
    "two lists": {
        "blocks.0.0.attn.q.weight": ("attn.q.weight", "0.0", True),
        "blocks.0.1.attn.q.weight": ("attn.q.weight", "0.1", True),
        "cls_attn_blocks.0.attn.q.weight": ("attn.q.weight", "cls_attn_blocks.0", True),
        "attn_pool.layer_scale1.scale": ("attn_pool.layer_scale1.scale", "attn_pool", False),
    },
    "no blocks": {"fc1.weight": ("fc1.weight", "fc1", False), "0.weight": ("0.weight", "0", False)},
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_places_in_any_backbone(backbone: str) -> None:
    wanted = BACKBONES[backbone]
    layout = lay_out(list(wanted))
    found = zip(layout.rows, layout.cols, strict=True)
    assert wanted == {
        name: (layout.operations[row], layout.columns[column], layout.is_block[column])
        for name, (row, column) in zip(wanted, found, strict=True)
    }
    assert layout.columns == list(dict.fromkeys(column for _, column, _ in wanted.values())), "not the model's order"


def test_blocks_stand_in_the_order_of_their_numbers() -> None:
    names = ["stem.w", "layers.1.blocks.0.w", "layers.1.downsample.w", "layers.0.blocks.10.w", "layers.0.blocks.9.w"]
    assert lay_out(names).columns == ["stem", "0.9", "1.downsample", "0.10", "1.0"]


@pytest.mark.parametrize("kind", ["scores", "losses"])
def test_pictures_show_something(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "deeper" / "picture.png"
    if kind == "scores":
        draw_scores({f"blocks.{i}.{op}.weight": 10.0**i for i in range(3) for op in "ab"} | {"norm.bias": 0.0}, path)
    else:
        draw_losses({"one": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "top1": 0.5}]}, path)
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
