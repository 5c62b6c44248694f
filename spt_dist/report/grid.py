"""Weights laid out as a grid of blocks and operations, the form in which scores and plans are looked at."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

# A numbered member of a list of blocks, such as blocks.3 or layers.2.blocks.5 (a stage's block), and what it holds.
_LIST, _NUMBERS = r"\w*(?:block|layer|stage)\w*", r"\d+(?:\.\d+)*"
_MEMBER = re.compile(
    rf"(?P<prefix>(?:\w+\.)*?)(?P<outer>{_LIST})\.(?P<numbers>{_NUMBERS})\."
    rf"(?:(?P<inner>{_LIST})\.(?P<more_numbers>{_NUMBERS})\.)?(?P<rest>.+)"
)


@dataclass(frozen=True)
class Place:
    """Where a parameter belongs.

    Attributes:
        operation: what it does there: "attn.q.weight", "downsample.reduction.weight", "patch_embed.proj.weight".
        column: its block ("3", or "2.5" for block 5 of stage 2); outside the blocks what it is part of ("patch_embed",
            or "1.downsample" in stage 1).
        block: which block, in the order of blocks; ``None`` outside the blocks.
    """

    operation: str
    column: str
    block: tuple[int, ...] | None


@dataclass(frozen=True)
class Layout:
    """The places of some parameters, as a grid.

    Attributes:
        operations: the grid's rows.
        columns: the blocks by number, and what lies outside them.
        is_block: whether each column is a block.
        rows: ``(num_parameters,)`` int64, each parameter's row.
        cols: ``(num_parameters,)`` int64, each parameter's column.
    """

    operations: list[str]
    columns: list[str]
    is_block: list[bool]
    rows: Array
    cols: Array

    @classmethod
    def of(cls, places: Sequence[Place], operations: list[str], columns: list[str]) -> "Layout":
        """Put ``places`` on a grid of these rows and columns."""
        blocks = {place.column for place in places if place.block is not None}
        return cls(
            operations,
            columns,
            [column in blocks for column in columns],
            np.array([operations.index(place.operation) for place in places], dtype=np.int64),
            np.array([columns.index(place.column) for place in places], dtype=np.int64),
        )


def to_grid(values: Mapping[str, float]) -> tuple[Array, list[str], list[str]]:
    """Sum values by operation (rows) and block (columns).

    Args:
        values: logical name -> value.

    Returns:
        ``(num_operations, num_columns)`` float64 with NaN where there is nothing, the operations, and the columns; see
        ``Layout``.
    """
    layout = lay_out(list(values))
    grid = np.full((len(layout.operations), len(layout.columns)), np.nan)
    for row, column, value in zip(layout.rows, layout.cols, values.values(), strict=True):
        grid[row, column] = np.nansum([grid[row, column], value])
    return grid, layout.operations, layout.columns


def lay_out(names: Sequence[str]) -> Layout:
    """Lay parameters out by operation and block, all in the order of the names but that the blocks go by number.

    Args:
        names: logical names, in the model's order.
    """
    places = find_places(names)
    block_of = {place.column: place.block for place in places}
    by_number = iter(sorted((block, column) for column, block in block_of.items() if block is not None))
    columns = [column if block is None else next(by_number)[1] for column, block in block_of.items()]
    return Layout.of(places, list(dict.fromkeys(place.operation for place in places)), columns)


def find_places(names: Sequence[str]) -> list[Place]:
    """Find each parameter's block and operation.

    Blocks are the numbered members of lists of blocks, layers or stages. Where the members hold such lists themselves
    (``stages.2.blocks.5``), theirs are the blocks, and what else a member holds lies outside the blocks. Blocks of the
    list with the most parameters go by their numbers alone, those of another (``cls_attn_blocks.0``) by its name too.

    Args:
        names: logical names.
    """
    members = [_MEMBER.fullmatch(name) for name in names]
    stages = {member["prefix"] + member["outer"] for member in members if member and member["inner"]}
    sizes = Counter(_list_of(member) for member in members if member and _list_of(member) not in stages)
    main = max(sizes, key=sizes.__getitem__, default="")
    prefix = next((member["prefix"] for member in members if member and _list_of(member) == main), "")
    order = {path: place for place, path in enumerate(sizes)}
    places = []
    for name, member in zip(names, members, strict=True):
        if member is None:
            inside = name.removeprefix(prefix)
            places.append(Place(inside, inside.split(".")[0], None))
        elif (path := _list_of(member)) in stages:
            places.append(Place(member["rest"], f"{member['numbers']}.{member['rest'].split('.')[0]}", None))
        else:
            numbers = ".".join(filter(None, (member["numbers"], member["more_numbers"])))
            column = numbers if path == main else f"{path.removeprefix(prefix)}.{numbers}"
            places.append(Place(member["rest"], column, (order[path], *map(int, numbers.split(".")))))
    return _tell_apart(places)


def _list_of(member: re.Match[str]) -> str:
    """Path of the list without numbers: ``layers.2.blocks.5.norm1.bias`` -> ``layers.blocks``."""
    return member["prefix"] + ".".join(filter(None, (member["outer"], member["inner"])))


def _tell_apart(places: list[Place]) -> list[Place]:
    """Give what lies outside the blocks another name where the blocks have an operation of the same."""
    in_blocks = {place.operation for place in places if place.block is not None}
    return [
        Place(f"{place.operation} (outside blocks)", place.column, None)
        if place.block is None and place.operation in in_blocks
        else place
        for place in places
    ]
