"""Writing files so that a reader never sees a half-written one."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spt_dist.errors import UserError


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Call ``write(temporary_path)``, sync the result to disk and rename it to ``path``.

    Args:
        path: where the file shall appear; missing folders are made.
        write: fills the temporary file, which lies in the same folder as ``path``.

    Returns:
        ``path`` as a ``Path``.

    Raises:
        OSError: as raised by the file system (a full disk, say); ``path`` is then what it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary_name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(temporary_name)
    try:
        write(temporary)
        _sync(temporary)
        # mkstemp makes files private; what we publish has the mode any new file would have.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` (UTF-8) to ``path`` atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write a safetensors file atomically, with ``metadata`` as JSON under the key ``spt_dist``.

    Args:
        path: the file.
        tensors: any shapes and dtypes; copied to contiguous CPU memory.
        metadata: anything JSON can hold.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = {"format": "pt", "spt_dist": json.dumps(metadata)}
    return write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=text))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_tensors`` wrote.

    Args:
        path: the file.
        kind: what the file must say it is in its metadata's ``kind`` ("plan", "delta", "checkpoint").

    Returns:
        The tensors on the CPU, and the metadata.

    Raises:
        UserError: the file is missing, truncated, no safetensors file, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a {kind} file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("spt_dist", "{}"))
            found = metadata.get("kind")
            if found != kind:
                what = f"a {found} file" if found else "a safetensors file without spt_dist metadata"
                raise UserError(f"{path}: this is {what}, not a {kind} file of spt_dist")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); it may be truncated") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
