"""Where the tensors of a timm model come from in a file, and what of the file nothing needs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from spt_dist.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where one tensor of a timm model comes from.

    Attributes:
        names: the file's tensors that it is made of, in the order that ``make`` takes them. None for a constant.
        shape: of what comes out.
        make: ``names``' tensors -> the model's tensor, in memory of its own; ``None``: the one tensor as it is.
        how: what ``make`` does, in a word or two ("transposed").
    """

    names: tuple[str, ...]
    shape: Shape
    make: Callable[..., Tensor] | None = None
    how: str = ""


@dataclass(frozen=True)
class Translation:
    """A file under timm's names. Every name of the file is in ``unused`` or in some source's ``names``.

    Attributes:
        format: whose the file is ("timm", "MAE").
        sources: timm's name -> its source, head included. A name that the format does not know stays as it is.
        unused: name in the file -> why no model needs it.
    """

    format: str
    sources: dict[str, Source]
    unused: dict[str, str]


class Draft:
    """A translation in the making: each name of the file is taken, or left, or stays as it is.

    Attributes:
        shapes: the file's names, without what wraps a whole model (``module.``) -> shapes.
    """

    def __init__(self, shapes: Mapping[str, Shape], own_names: Mapping[str, str]) -> None:
        """``own_names``: names of ``shapes`` -> what the file calls them."""
        self.shapes = shapes
        self._own_names = own_names
        self._sources: dict[str, Source] = {}
        self._unused: dict[str, str] = {}
        self._done: set[str] = set()

    def take(self, target: str, name: str) -> None:
        """``target`` (timm's name) is the file's tensor ``name`` as it is."""
        self.make(target, [name], self.shapes[name], None, "")

    def make(
        self, target: str, names: Iterable[str], shape: Shape, make: Callable[..., Tensor] | None, how: str
    ) -> None:
        """``target`` is made of the file's tensors ``names``; see ``Source``.

        Raises:
            UserError: the file has ``target`` in two places.
        """
        names = tuple(names)
        source = Source(tuple(self._own_names[name] for name in names), shape, make, how)
        if target in self._sources:
            first, second = (", ".join(each.names) for each in (self._sources[target], source))
            raise UserError(f"{first} and {second} are both {target} under timm's names; keep one of them in the file")
        self._sources[target] = source
        self._done.update(names)

    def leave(self, name: str, why: str) -> None:
        """No model needs the file's tensor ``name``."""
        self._unused[self._own_names[name]] = why
        self._done.add(name)

    def rest(self) -> list[str]:
        """The file's names that are neither taken nor left, in its order."""
        return [name for name in self.shapes if name not in self._done]

    def finish(self, format_name: str) -> Translation:
        """The translation; what is neither taken nor left stays as it is."""
        for name in self.rest():
            self.take(name, name)
        return Translation(format_name, self._sources, self._unused)
