"""Solids on the ground as CLEVR has them, and VTAB's two tasks on them: how many there are, how far the closest is.

CLEVR's scenes hold 3 to 10 cubes, spheres and cylinders of two sizes, two materials and eight colours. VTAB's count has
the eight classes 3 to 10; its distance has six, at even steps of the depth of the closest solid. Here the camera stands
still, no solid hides another and none is grey, which is the eighth colour.

Shape suffixes: N solids, H rows, W columns, C colour channels.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from spt_dist.data.mini.canvas import FINE, IMAGE_SIZE, Draw, Floats, Pixels, fine_grid, lit, pooled, to_pixels

KINDS: Final = ("cube", "sphere", "cylinder")
COLOURS: Final[dict[str, tuple[float, float, float]]] = {
    "red": (0.68, 0.14, 0.14),
    "blue": (0.16, 0.29, 0.84),
    "green": (0.11, 0.41, 0.08),
    "brown": (0.51, 0.29, 0.1),
    "purple": (0.5, 0.15, 0.75),
    "cyan": (0.16, 0.82, 0.82),
    "yellow": (1.0, 0.93, 0.2),
}
FEWEST, MOST = 3, 10
NEAREST, FARTHEST = 1.0, 2.5
NEAREST_BINS: Final = np.linspace(NEAREST, 1.75, 7)
"""Depths between which the closest solid lies, for the six classes of the distance."""
_MOST_IN_DISTANCE: Final = 6
_HORIZON: Final = -6.5
_SLOPE: Final = 37.5
_LARGE, _SMALL = 4.2, 2.8
_GAP: Final = 1.3


@dataclass(frozen=True)
class Solid:
    """A solid that stands on the ground.

    Attributes:
        kind, colour: of ``KINDS`` and ``COLOURS``.
        size: half its width at depth 1, in pixels.
        depth: distance from the camera.
        column: its middle, in pixels from the left border.
        is_shiny: metal, not rubber.
    """

    kind: str
    colour: str
    size: float
    depth: float
    column: float
    is_shiny: bool

    @property
    def radius(self) -> float:
        """Half its width and height in the picture, in pixels."""
        return self.size / self.depth

    @property
    def row(self) -> float:
        """Where its foot is, in pixels from the upper border."""
        return row_of(self.depth)


def row_of(depth: float) -> float:
    """Where the ground of a depth is seen, in pixels from the upper border."""
    return _HORIZON + _SLOPE / depth


def _apart(first: Solid, second: Solid) -> bool:
    """Whether at least ``_GAP`` pixels lie between two solids' squares."""
    room = first.radius + second.radius + _GAP
    rows = (first.row - first.radius) - (second.row - second.radius)
    return abs(first.column - second.column) > room or abs(rows) > room


def place_solids(rng: np.random.Generator, count: int, nearest: float | None) -> list[Solid]:
    """Solids none of which hides another, the farthest first.

    Args:
        rng: draws them.
        count: how many.
        nearest: depth of the closest; ``None`` for whatever comes.
    """
    solids: list[Solid] = []
    tries = 0
    while len(solids) < count:
        # What was placed first may leave no room for the rest.
        if tries % 200 == 0:
            solids = []
        tries += 1
        # Even over the picture, not over the ground: far away there would be no room for all of them.
        row = rng.uniform(row_of(FARTHEST), row_of(nearest or NEAREST))
        depth = nearest if nearest and not solids else _SLOPE / (row - _HORIZON)
        size = float(rng.choice((_SMALL, _LARGE)))
        column = rng.uniform(size / depth + 0.5, IMAGE_SIZE - size / depth - 0.5)
        solid = Solid(str(rng.choice(KINDS)), str(rng.choice(tuple(COLOURS))), size, depth, column, rng.random() < 0.5)
        if all(_apart(solid, other) for other in solids):
            solids.append(solid)
    return sorted(solids, key=lambda solid: -solid.depth)


def _surface(kind: str, right_HW: Floats, up_HW: Floats) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Where a solid is, and how bright; coordinates are -1 to 1 across it, its foot is at ``up`` -1."""
    if kind == "sphere":
        height_HW = np.sqrt((1 - right_HW**2 - up_HW**2).clip(0, 1))
        return right_HW**2 + up_HW**2 < 1, 0.45 + 0.4 * height_HW + 0.25 * up_HW - 0.1 * right_HW
    if kind == "cube":
        is_top_HW = (up_HW > 0.45) & (np.abs(right_HW - 0.35 * (up_HW - 0.45)) < 0.8) & (up_HW < 1)
        is_front_HW = (up_HW <= 0.45) & (up_HW > -1) & (np.abs(right_HW) < 0.8)
        return is_top_HW | is_front_HW, np.where(is_top_HW, 1.1, 0.7)
    is_top_HW = right_HW**2 / 0.64 + (up_HW - 0.65) ** 2 / 0.1225 < 1
    is_foot_HW = right_HW**2 / 0.64 + (up_HW + 0.65) ** 2 / 0.1225 < 1
    is_side_HW = (np.abs(right_HW) < 0.8) & (np.abs(up_HW) < 0.65)
    return is_top_HW | is_foot_HW | is_side_HW, np.where(is_top_HW, 1.1, 0.75 - 0.35 * right_HW)


def _around(solid: Solid) -> tuple[slice, slice]:
    """The part of the fine grid that a solid and its shadow lie in."""
    top, left = solid.row - 2.2 * solid.radius, solid.column - 1.5 * solid.radius
    height, width = 2.5 * solid.radius, 3 * solid.radius
    first_row, first_column = max(0, int(FINE * top)), max(0, int(FINE * left))
    return slice(first_row, int(FINE * (top + height)) + 1), slice(first_column, int(FINE * (left + width)) + 1)


def paint_solids(solids: list[Solid], ground_HWC: Floats) -> Floats:
    """The solids, in their order, with their shadows, on the ground.

    Args:
        solids: the farthest first.
        ground_HWC: ``(128, 128, 3)``, 0 to 1; painted over.

    Returns:
        ``(32, 32, 3)``.
    """
    rows_HW, columns_HW = fine_grid()
    seen = []
    for solid in solids:
        part = _around(solid)
        right_HW = (columns_HW[part] - solid.column) / solid.radius
        up_HW = (solid.row - rows_HW[part]) / solid.radius - 1
        ground_HWC[part][(right_HW - 0.3) ** 2 + ((up_HW + 0.85) / 0.35) ** 2 < 1] *= 0.72
        seen.append((solid, ground_HWC[part], right_HW, up_HW))
    for solid, part_HWC, right_HW, up_HW in seen:
        is_solid_HW, shade_HW = _surface(solid.kind, right_HW, up_HW)
        colour_HWC = np.asarray(COLOURS[solid.colour]) * shade_HW[..., None]
        if solid.is_shiny:
            gleam_HW = np.exp(-8 * ((right_HW + 0.3) ** 2 + (up_HW - 0.35) ** 2))
            colour_HWC = colour_HWC + 0.5 * gleam_HW[..., None]
        part_HWC[is_solid_HW] = colour_HWC[is_solid_HW]
    return pooled(ground_HWC)


def _picture(rng: np.random.Generator, solids: list[Solid]) -> Pixels:
    rows_HW, _ = fine_grid()
    ground_HWC = np.repeat((rng.uniform(0.42, 0.6) + 0.004 * rows_HW)[..., None], 3, axis=-1)
    return to_pixels(rng, lit(rng, paint_solids(solids, ground_HWC), 0.16), 0.03)


def count_task() -> Draw:
    """CLEVR-Count: the class is the number of solids, less three."""

    def draw(rng: np.random.Generator, split: str, number: int) -> tuple[Pixels, int]:
        count = int(rng.integers(FEWEST, MOST + 1))
        return _picture(rng, place_solids(rng, count, None)), count - FEWEST

    return draw


def distance_task() -> Draw:
    """CLEVR-Dist: the class says between which two depths the closest solid is. Three to six solids."""

    def draw(rng: np.random.Generator, split: str, number: int) -> tuple[Pixels, int]:
        count = int(rng.integers(FEWEST, _MOST_IN_DISTANCE + 1))
        label = int(rng.integers(len(NEAREST_BINS) - 1))
        nearest = rng.uniform(NEAREST_BINS[label], NEAREST_BINS[label + 1])
        return _picture(rng, place_solids(rng, count, nearest)), label

    return draw
