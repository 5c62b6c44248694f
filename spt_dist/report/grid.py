"""Weights laid out as a grid of blocks and operations, the form in which scores and plans are looked at."""

import re
from collections.abc import Mapping

import numpy as np

Array = np.ndarray


def to_grid(values: Mapping[str, float]) -> tuple[Array, list[str], list[str]]:
    """Sum values by operation (rows) and block (columns).

    Args:
        values: logical name -> value; names without a block number fall into a last column "rest".

    Returns:
        ``(num_operations, num_columns)`` float64 with NaN where there is nothing, the operations, and the columns.
    """
    places = {name: _place(name) for name in values}
    operations = list(dict.fromkeys(operation for operation, _ in places.values()))
    blocks = sorted({block for _, block in places.values() if block is not None})
    columns = [str(block) for block in blocks] + (["rest"] if None in {block for _, block in places.values()} else [])
    grid = np.full((len(operations), len(columns)), np.nan)
    for name, value in values.items():
        operation, block = places[name]
        cell = operations.index(operation), columns.index("rest" if block is None else str(block))
        grid[cell] = np.nansum([grid[cell], value])
    return grid, operations, columns


def _place(name: str) -> tuple[str, int | None]:
    """``blocks.3.attn.q.weight`` -> ("attn.q.weight", 3)."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (match[2], int(match[1])) if match else (name, None)
