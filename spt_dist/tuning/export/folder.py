"""Folders of an export: which ones may be written, and in what order."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spt_dist.errors import UserError

EXPORT_KEY = "export"


def open_folder(folder: str | Path, export: str, marker: str, last: str) -> Path:
    """Make ``folder`` ready for an export, which then writes the file ``marker`` first and the file ``last`` last.

    ``last`` is the file that readers look for: one of an earlier export goes, so that no reader takes a mixture of two
    exports for a whole one. Other files stay.

    Args:
        folder: made, with its parents, if it does not exist.
        export: the kind of export, which the metadata of ``marker`` names under ``EXPORT_KEY``.
        marker: name of the safetensors file that tells such an export.
        last: name of the file without which the folder is no whole export.

    Returns:
        ``folder`` as a ``Path``.

    Raises:
        UserError: ``folder`` is a file, or holds something else than such an export. It is unchanged then.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but an export needs a folder; give another one")
    if folder.is_dir() and any(folder.iterdir()) and _export_of(folder / marker) != export:
        raise UserError(f"{folder}: holds other files than an earlier {export} export; empty it or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / last).unlink(missing_ok=True)
    return folder


def _export_of(path: Path) -> str | None:
    """The kind of export that a file is the marker of, if it is one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("spt_dist", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError):
        return None
    found = metadata.get(EXPORT_KEY)
    return found if isinstance(found, str) else None
