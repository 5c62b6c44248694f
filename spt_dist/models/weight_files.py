"""Files of weights by other libraries: name -> tensor, as safetensors or as PyTorch writes them."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.files import save_tensors, write_atomically

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
# Under these keys timm, DeiT, MAE, DeepSpeed and the OpenMMLab libraries keep the weights.
_STATE_KEYS = ("state_dict", "model", "module")
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


class StoredWeights(Protocol):
    """Weights of a file; a tensor is read when it is asked for."""

    def names(self) -> list[str]:
        """The names, in the file's order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, which is not read."""

    def dtype(self, name: str) -> str:
        """What its numbers are, in safetensors' words (``F32``)."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start .. stop`` of one tensor, on the CPU; nothing else of it is read."""


def open_weights(path: Path) -> StoredWeights:
    """Open a file of weights: PyTorch's for ``.pth``, ``.pt`` and ``.bin``, safetensors for every other suffix.

    Raises:
        UserError: it is missing or not readable; or PyTorch's file holds anything but plain data, or no state dict.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return _TorchWeights(path) if path.suffix in TORCH_SUFFIXES else _SafetensorsWeights(path)


def write_weights(path: Path, state: Mapping[str, Tensor]) -> Path:
    """Write a state dict so that ``open_weights`` and mmengine's ``load_checkpoint`` read it. Atomic.

    Args:
        path: ``.pth``, ``.pt`` and ``.bin`` have the OpenMMLab libraries' layout, ``.safetensors`` is plain.
        state: tensors on the CPU.

    Raises:
        UserError: another suffix.
    """
    if path.suffix in TORCH_SUFFIXES:
        return write_atomically(path, lambda temporary: torch.save({"meta": {}, "state_dict": dict(state)}, temporary))
    if path.suffix == ".safetensors":
        return save_tensors(path, state, {"kind": "weights"})
    raise UserError(f"{path}: has to end in .safetensors, .pth, .pt or .bin")


class _SafetensorsWeights:
    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        found: str = self._file.get_slice(name).get_dtype()
        return found

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows: Tensor = self._file.get_slice(name)[start:stop]
        return rows


class _TorchWeights:
    def __init__(self, path: Path) -> None:
        self._state = _find_state(path, _load(path))

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> str:
        return _DTYPES.get(self._state[name].dtype, str(self._state[name].dtype))

    def read(self, name: str) -> Tensor:
        # What the file is mapped to would change with the file.
        return self._state[name].detach().clone()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._state[name].detach()[start:stop].clone()


def _load(path: Path) -> Any:
    try:
        # Files from before PyTorch 1.6 are no archives, and can only be read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # A damaged file meets torch's reader in a dozen ways.
    except Exception as error:
        refused = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise UserError(
                f"{path}: not a readable PyTorch file ({type(error).__name__}); it may be truncated"
            ) from error
        raise UserError(
            f"{path}: holds {refused[1]} beside its weights, and reading such objects can run any code. If you trust "
            "where it comes from, keep the weights alone: "
            f"python -c \"import torch; torch.save(torch.load('{path}', weights_only=False)['state_dict'], 'new.pth')\""
        ) from error


def _find_state(path: Path, content: Any) -> dict[str, Tensor]:
    found = content
    if isinstance(content, dict):
        found = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), dict)), content)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, dict) else type(found).__name__
        raise UserError(
            f"{path}: no state dict (name -> tensor), neither bare nor under {', '.join(_STATE_KEYS)}; found {keys}"
        )
    return found
