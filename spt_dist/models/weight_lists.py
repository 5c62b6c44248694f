"""Weights in several files with a list of them, ``NAME.index.json``, as Hugging Face's libraries write large models."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spt_dist.errors import UserError

if TYPE_CHECKING:
    from spt_dist.models.weight_files import StoredWeights

_SUFFIX = ".index.json"
_FILES = (".safetensors", ".bin")


def is_list(path: Path) -> bool:
    """Whether a file is called as a list of files of weights is."""
    return path.name.endswith(_SUFFIX)


def files_of(path: Path) -> list[Path]:
    """The files that hold the weights: those that a list names, in the order of their names, or the file itself.

    Raises:
        UserError: a list is not readable, or names what is no file of weights in its own folder, or is not there.
    """
    return _listed_files(path, _read_map(path)) if is_list(path) else [path]


def _listed_files(path: Path, listed: Mapping[str, str]) -> list[Path]:
    names = sorted(set(listed.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise UserError(f"{path}: lists {missing[0]}, which is not beside it; get all files that it lists")
    return [path.parent / name for name in names]


def _read_map(path: Path) -> dict[str, str]:
    """The list's tensor -> file."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); get the file anew") from error
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: has no weight_map (tensor -> file), which lists of a model's files have")
    for name, file in found.items():
        # A list could lead to any file of the machine otherwise.
        if not isinstance(file, str) or not file.isprintable() or Path(file).name != file or not file.endswith(_FILES):
            raise UserError(f"{path}: {name} is in {file!r}, which names no {' or '.join(_FILES)} file beside the list")
    return found


class ListedWeights:
    """The weights of all files that a list names, as one.

    Args:
        path: of the list.
        open_file: opens one of its files.

    Raises:
        UserError: as ``files_of``; a file is not readable; or the list and the files do not hold the same.
    """

    def __init__(self, path: Path, open_file: "Callable[[Path], StoredWeights]") -> None:
        listed = _read_map(path)
        opened = {part.name: open_file(part) for part in _listed_files(path, listed)}
        held = {(name, file) for file, weights in opened.items() for name in weights.names()}
        if differing := sorted(held ^ set(listed.items())):
            name, file = differing[0]
            says = "the list does not say so" if (name, file) in held else "only the list says so"
            raise UserError(f"{path}: {name} is in {file}: {says}; get the list and its files anew, from one place")
        self._of = {name: opened[file] for name, file in listed.items()}

    def names(self) -> list[str]:
        return list(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of[name].shape(name)

    def dtype(self, name: str) -> str:
        return self._of[name].dtype(name)

    def read(self, name: str) -> Tensor:
        return self._of[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._of[name].read_rows(name, start, stop)
