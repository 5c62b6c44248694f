"""What a list says of an image, and whether the image is there."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from spt_dist.errors import UserError


@dataclass(frozen=True)
class Listed:
    """An entry of a list.

    Attributes:
        where: the list and the place in it, which no other entry has; for errors.
        file: path relative to a folder, with "/" between folders.
        label: a class from 0.
    """

    where: str
    file: str
    label: int


def read_text(path: Path) -> str:
    """A list's text.

    Raises:
        UserError: it can't be read, or is no text.
    """
    try:
        # Editors on Windows put a mark in front.
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8 ({error.reason} at byte {error.start:,})") from error


def require_sound(root: Path, listed: Sequence[Listed], name: str) -> None:
    """Check a list as far as that takes no reading of images.

    Args:
        root: the folder that files are relative to; none may lie outside of it.
        listed: the entries.
        name: of the list.

    Raises:
        UserError: it is empty, or names a file that leaves ``root``, comes twice or is missing.
    """
    if not listed:
        raise UserError(f"{name}: lists no image")
    places: dict[str, str] = {}
    for entry in listed:
        path = PurePosixPath(entry.file)
        if path.is_absolute() or PureWindowsPath(entry.file).drive or ".." in path.parts or "\0" in entry.file:
            raise UserError(
                f"{entry.where}: {entry.file!r} leads out of {root}; write it relative to that, without '..'"
            )
        first = places.setdefault(str(path), entry.where)
        if first != entry.where:
            raise UserError(f"{entry.where}: {entry.file!r} is in the list already ({first})")
    missing = _missing(root, listed)
    if missing:
        more = f"; of {len(listed):,} files {len(missing):,} are" if len(missing) > 1 else ""
        raise UserError(f"{missing[0].where}: {root / missing[0].file} is missing{more}")


def _missing(root: Path, listed: Sequence[Listed]) -> list[Listed]:
    """Entries without a file; folders are listed once, as asking for each file takes minutes over a network."""
    files: dict[Path, set[str]] = {}
    missing = []
    for entry in listed:
        path = root / entry.file
        if path.parent not in files:
            files[path.parent] = _files_in(path.parent)
        if path.name not in files[path.parent]:
            missing.append(entry)
    return missing


def _files_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()
