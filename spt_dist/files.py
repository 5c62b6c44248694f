"""Writing files so that a reader never sees a half-written one."""

import errno
import json
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spt_dist.errors import UserError

# Under this name is the checksum of the metadata.
_METADATA = ""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


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

    Raises:
        OSError: as ``write_atomically``.
    """
    plain = _without_shared_memory({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    described = json.dumps(metadata)
    checksums = {name: _checksum(tensor) for name, tensor in plain.items()}
    checksums[_METADATA] = zlib.crc32(described.encode())
    text = {"format": "pt", "spt_dist": described, "crc32": json.dumps(checksums)}

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata=text)
        except SafetensorError as error:
            # Its own class hides what the file system said.
            found = _OS_ERROR.search(str(error))
            raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from error

    return write_atomically(path, write)


class TensorFile(Mapping[str, Tensor]):
    """A file that ``save_tensors`` wrote: name -> tensor on the CPU, each read, and checked, when it is asked for.

    Attributes:
        metadata: what was given to ``save_tensors``.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        """Open a file.

        Args:
            path: the file.
            kind: what the file must say it is in its metadata's ``kind`` ("plan", "delta", "checkpoint").

        Raises:
            UserError: the file is missing, truncated, no safetensors file, or of another kind.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; expected a {kind} file")
        try:
            self._file = safe_open(self.path, framework="pt")
            self._names = dict.fromkeys(self._file.keys())
            written = self._file.metadata() or {}
            described = written.get("spt_dist", "{}")
            self.metadata: dict[str, Any] = json.loads(described)
            # Files of earlier versions have none.
            self._checksums: dict[str, int] = json.loads(written.get("crc32", "{}"))
        except (SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); it may be truncated") from error
        if self._checksums.get(_METADATA, zlib.crc32(described.encode())) != zlib.crc32(described.encode()):
            raise UserError(f"{path}: its metadata is not what was written; the file is damaged, take another copy")
        found = self.metadata.get("kind")
        if found != kind:
            what = f"a {found} file" if found else "a safetensors file without spt_dist metadata"
            raise UserError(f"{path}: this is {what}, not a {kind} file of spt_dist")

    @property
    def has_checksums(self) -> bool:
        """Whether damage will be noticed; files of earlier versions have no checksums."""
        return self._checksums.keys() == {*self._names, _METADATA}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        if _checksum(tensor) != self._checksums.get(name, _checksum(tensor)):
            raise UserError(f"{self.path}: {name} is not what was written; the file is damaged, take another copy")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all of a file that ``save_tensors`` wrote: its tensors and its metadata.

    Raises:
        UserError: as ``TensorFile``; or a tensor is damaged.
    """
    file = TensorFile(path, kind)
    return dict(file), file.metadata


def _without_shared_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those copied that have memory in common with others, which safetensors does not write."""
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {
        name: tensor.clone() if storages[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in tensors.items()
    }


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


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
