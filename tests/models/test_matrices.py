"""The inventory's table, of models whose counts are known by hand."""

import timm
import torch
from torch import nn

from spt_dist.models.matrices import operation_of, take_inventory


def rows_of(table: str) -> dict[str, tuple[int, int]]:
    """Kinds in the table -> tensors and weights."""
    lines = [line.split("│")[1:-1] for line in table.splitlines() if line.startswith("│ ") and line[2] != " "]
    return {name.strip(): (int(count.replace(",", "")), int(size.replace(",", ""))) for name, count, size in lines}


def test_a_plain_vit() -> None:
    """ViT-B/16: 12 blocks of width 768, 197 positions, 16 x 16 patches of 3 channels."""
    with torch.device("meta"):
        inventory = take_inventory(timm.create_model("vit_base_patch16_224", num_classes=100))
    square = 768 * 768
    assert rows_of(inventory.summary()) == {
        "matrices: Linear": (36, 12 * 9 * square),
        "matrices: parts of a fused Linear": (36, 12 * 3 * square),
        "dense convolutions": (1, 768 * 3 * 16 * 16),
        # A block has two norms (4), the biases of q, k, v, proj and fc2 (5) and of fc1, four times as wide.
        "vectors": (1 + 12 * 10 + 2, 768 * (1 + 12 * 13 + 2)),
        "tokens and tables": (1, 197 * 768),
        "always tuned, whatever the scores": (1, 768),
        "head: always trained, never counted": (2, 768 * 100 + 100),
    }
    # One screen, whatever the depth.
    assert len(inventory.summary().splitlines()) < 40


def test_convnext() -> None:
    """ConvNeXt-B: 3, 3, 27 and 3 blocks of width 128 to 1024, with kernels of 7 x 7."""
    with torch.device("meta"):
        linear, pointwise = (
            take_inventory(timm.create_model("convnext_base", num_classes=10, conv_mlp=conv)) for conv in (False, True)
        )
    blocks = {128: 3, 256: 3, 512: 27, 1024: 3}
    rows = rows_of(linear.summary())
    products = sum(count * 8 * width**2 for width, count in blocks.items())
    assert rows["matrices: depthwise convolutions"] == (36, 49 * sum(n * width for width, n in blocks.items()))
    assert rows["matrices: Linear"] == (72, products)
    assert rows["dense convolutions"] == (4, 128 * 48 + 4 * (128 * 256 + 256 * 512 + 512 * 1024))
    # The same weights as convolutions.
    rows["matrices: pointwise convolutions"] = rows.pop("matrices: Linear")
    assert rows_of(pointwise.summary()) == rows


def test_shapes_of_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, (3, 5), groups=4), nn.Conv2d(8, 6, 1), nn.Linear(6, 3), nn.Conv2d(6, 2, 3))
    known = take_inventory(model).by_name()
    assert known["0.weight"].matrix_shape == (8, 15) and known["0.weight"].shape == (8, 1, 3, 5)
    assert known["1.weight"].matrix_shape == (6, 8)
    assert known["2.weight"].matrix_shape == (3, 6)
    assert [name for name in known if known[name].is_matrix] == ["0.weight", "1.weight", "2.weight"]
    assert operation_of("stages.0.blocks.11.conv_dw.weight") == "stages.blocks.conv_dw.weight"
