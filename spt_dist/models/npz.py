"""Files of weights as numpy writes them: a zip archive with an array in each member."""

import zipfile
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from spt_dist.errors import UserError

# How the name of each array's file in the archive ends.
NPY = ".npy"
# numpy's and torch's words -> safetensors'.
DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32", "int8": "I8"} | {
    "uint8": "U8",
    "int16": "I16",
    "bool": "BOOL",
}
_PIECE = 1 << 20


@dataclass(frozen=True)
class _Header:
    """What stands before an array's numbers.

    Attributes:
        member: the array's file in the archive.
        start: the first byte of its numbers.
        is_transposed: whether they are in Fortran's order.
    """

    member: zipfile.ZipInfo
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype
    is_transposed: bool

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class NpzWeights:
    """``StoredWeights`` of an ``.npz`` archive: headers are read when it is opened, numbers when they are asked for.

    Nothing in it is unpickled.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` and read every array's header.

        Raises:
            UserError: it is no archive, or damaged; or holds anything but arrays of numbers.
        """
        self._path = path
        # A damaged file meets zipfile, zlib and numpy's parser in a dozen ways.
        try:
            self._archive = zipfile.ZipFile(path)
            members = self._archive.infolist()
        except Exception as error:
            raise UserError(f"{path}: not a readable .npz file ({error}); it may be truncated") from error
        counts = Counter(member.filename for member in members)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise UserError(f"{path}: has {twice[0]} more than once; keep one of them")
        self._headers = {member.filename.removesuffix(NPY): self._read_header(member) for member in members}

    def names(self) -> list[str]:
        """The names, in the file's order."""
        return list(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one array, which is not read."""
        return self._headers[name].shape

    def dtype(self, name: str) -> str:
        """What its numbers are, in safetensors' words (``F32``)."""
        return DTYPES[self._headers[name].dtype.name]

    def read(self, name: str) -> Tensor:
        """One array, on the CPU, in memory of its own.

        Raises:
            UserError: the file is damaged there.
        """
        header = self._headers[name]
        numbers = self._read_bytes(header, 0, header.num_bytes).view(header.dtype)
        array = numbers.reshape(header.shape, order="F" if header.is_transposed else "C")
        return torch.from_numpy(np.ascontiguousarray(array, dtype=header.dtype.newbyteorder("=")).reshape(header.shape))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start .. stop`` of one array, on the CPU; nothing else is kept of it.

        Raises:
            UserError: the file is damaged before or within them.
        """
        header = self._headers[name]
        start, stop, _ = slice(start, stop).indices(header.shape[0])
        if header.is_transposed:
            return self.read(name)[start:stop].clone()
        bytes_of_a_row = header.num_bytes // max(header.shape[0], 1)
        rows = max(stop - start, 0)
        numbers = self._read_bytes(header, start * bytes_of_a_row, rows * bytes_of_a_row).view(header.dtype)
        return torch.from_numpy(numbers.reshape(rows, *header.shape[1:]).astype(header.dtype.newbyteorder("=")))

    def _read_header(self, member: zipfile.ZipInfo) -> _Header:
        where = f"{self._path}: {member.filename}"
        if not member.filename.endswith(NPY):
            raise UserError(f"{where} is no array; numpy.savez puts nothing else into an .npz file")
        try:
            with self._archive.open(member) as file:
                shape, is_transposed, dtype = _parse_header(file)
                header = _Header(member, file.tell(), shape, dtype, is_transposed)
        except Exception as error:
            raise UserError(f"{where} is not readable ({error}); the file may be truncated") from error
        if dtype.hasobject:
            raise UserError(
                f"{where} holds Python objects, and reading such can run any code; save the arrays of numbers alone"
            )
        if dtype.name not in DTYPES:
            raise UserError(f"{where} holds {dtype}; give it one of {', '.join(DTYPES)} and save it again")
        if min(shape, default=0) < 0 or header.start + header.num_bytes != member.file_size:
            raise UserError(
                f"{where} has {member.file_size - header.start} bytes, its shape {shape} of {dtype} needs "
                f"{header.num_bytes}; the file is damaged"
            )
        return header

    def _read_bytes(self, header: _Header, start: int, count: int) -> np.ndarray:
        """``count`` bytes of an array's numbers from ``start`` on; the checksum is compared where all are read."""
        numbers = np.empty(count, np.uint8)
        first = header.start + start
        position = 0
        try:
            with self._archive.open(header.member) as file:
                # Its own seek() takes up to 16 MiB at once, and as much again while they are unpacked.
                while position < first + count:
                    piece = file.read(min(_PIECE, first - position if position < first else first + count - position))
                    if not piece:
                        raise EOFError(f"it ends after {position} of {first + count} bytes")
                    if position >= first:
                        numbers[position - first : position - first + len(piece)] = np.frombuffer(piece, np.uint8)
                    position += len(piece)
        except Exception as error:
            raise UserError(f"{self._path}: {header.member.filename} is damaged ({error})") from error
        return numbers


def _parse_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype; ``file`` is at the first number afterwards."""
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    if version == (2, 0):
        return npy.read_array_header_2_0(file)
    # 3.0 differs in the names of fields of records, which no weights have.
    raise ValueError(f"version {version} of numpy's format")
