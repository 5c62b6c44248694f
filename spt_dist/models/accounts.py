"""What becomes of every tensor of a checkpoint, and where every tensor of the model comes from."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from spt_dist.models.formats import Shape
from spt_dist.tables import format_table

_NUMBERS = re.compile(r"(\d+)")
# `blocks.3.norm1`: the 3, not the 1.
_PLACE = re.compile(r"(?<=\.)\d+(?=\.)")
_WIDEST = 84


@dataclass(frozen=True)
class Row:
    """One tensor of the model, or one of the file that no tensor of the model needs.

    Attributes:
        names: the file's tensors; none where the model's starts at a value of its own.
        found: their shapes.
        target: the model's tensor; ``None``: ``names`` (one) is left out.
        wanted: its shape.
        how: what is done on the way, or why ``names`` is left out; empty: taken as it is.
    """

    names: tuple[str, ...]
    found: tuple[Shape, ...]
    target: str | None
    wanted: Shape | None
    how: str


@dataclass(frozen=True)
class Account:
    """Every tensor of a checkpoint and of a model's state dict.

    Attributes:
        path: the checkpoint.
        format: whose names it has ("timm", "MAE").
        rows: the model's tensors in its order, then what is left out in the file's.
    """

    path: Path
    format: str
    rows: tuple[Row, ...]

    def table(self) -> str:
        """A table of one screen: tensors that differ in nothing but their block are one line."""
        taken, changed, left, fresh = self._kinds()
        num_names = len({name for row in self.rows for name in row.names})
        counts = {"taken as they are": taken, "changed on the way": changed, "not from the file": fresh}
        words = ", ".join(f"{len(rows)} {what}" for what, rows in counts.items() if rows)
        title = f"{self.path}: {num_names} tensors, format {self.format}, {len(left)} left out\n"
        title += f"under timm's names {len(taken) + len(changed) + len(fresh)} tensors: {words}"
        body = [_line(group) for rows in (taken, changed, fresh, left) for group in _collapse(rows)]
        columns = ["in the file", "tensors", "under timm's names", "shape", "how, or why not"]
        return format_table(title, columns, body, words=columns[2:])

    def _kinds(self) -> tuple[list[Row], list[Row], list[Row], list[Row]]:
        """Rows of what is taken as it is, taken and changed, left out, and of what has nothing in the file."""
        wanted = [row for row in self.rows if row.target is not None]
        given = [row for row in wanted if row.names]
        left = [row for row in self.rows if row.target is None]
        as_is, changed = [row for row in given if not row.how], [row for row in given if row.how]
        return as_is, changed, left, [row for row in wanted if not row.names]


def _collapse(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = [row.how]
        # Nobody asks what a decoder looks like inside that is left out.
        if row.wanted is not None:
            names = [row.target or "", *(_NUMBERS.sub("*", name) for name in row.names)]
            key += [_PLACE.sub("*", names[0]), *names[1:], str(len(row.wanted))]
        groups.setdefault(tuple(key), []).append(row)
    return list(groups.values())


def _line(group: Sequence[Row]) -> list[str]:
    names = _join([_pattern(place) for place in zip(*(row.names for row in group), strict=True)])
    targets = _pattern([row.target for row in group if row.target is not None])
    if all(row.names == (row.target,) for row in group):
        targets = "same"
    elif names == targets:
        # The numbers that differ are others.
        names, targets = f"{group[0].names[0]}, ...", f"{group[0].target}, ..."
    return [_cut(names), str(len(group)), _cut(targets), _shapes(group), group[0].how]


def _pattern(names: Sequence[str]) -> str:
    """The names as one, with ``*`` for the numbers that differ; of names of several kinds the first."""
    if not names:
        return ""
    parts = [_NUMBERS.split(name) for name in names]
    if len({tuple(each[::2]) for each in parts}) > 1:
        return f"{names[0]}, ..."
    return "".join(one[0] if len(set(one)) == 1 else "*" for one in zip(*parts, strict=True))


def _join(names: Sequence[str]) -> str:
    """``a.q.w``, ``a.k.w`` -> ``a.{q,k}.w``."""
    if len(names) < 2:
        return "".join(names)
    start = _common_start(names)
    ends = [name.removeprefix(start) for name in names]
    end = _common_start([each[::-1] for each in ends])[::-1]
    return f"{start}{{{','.join(each.removesuffix(end) for each in ends)}}}{end}"


def _common_start(names: Sequence[str]) -> str:
    return "".join(
        letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    )


def _shapes(group: Sequence[Row]) -> str:
    words = [_words(row) for row in group]
    return words[0] if len(set(words)) == 1 else f"{words[0]}, ..."


def _words(row: Row) -> str:
    found = _size(row.found[0]) if row.found else ""
    if len(set(row.found)) > 1:
        found = ", ".join(map(_size, row.found))
    elif len(row.found) > 1:
        found = f"{len(row.found)} of {found}"
    wanted = _size(row.wanted) if row.wanted is not None else ""
    if not row.names or row.found == (row.wanted,):
        return wanted
    return f"{found} -> {wanted}" if wanted else found


def _size(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "1"


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 4]} ..."
