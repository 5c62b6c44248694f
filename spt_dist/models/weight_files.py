"""Files of weights by other libraries: name -> tensor, as safetensors, PyTorch or numpy writes them."""

import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.files import save_tensors, write_atomically
from spt_dist.models.npz import DTYPES, NPY, NpzWeights
from spt_dist.models.weight_lists import ListedWeights, is_list

_logger = logging.getLogger(__name__)
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
# As MoCo v3 and others name PyTorch's files too: `.pth.tar`. They are no tar archives.
_READ_BY_TORCH = (*TORCH_SUFFIXES, ".tar")
# Under these keys timm, DeiT, MAE, DeepSpeed and the OpenMMLab libraries keep the weights.
_STATE_KEYS = ("state_dict", "model", "module")
_DTYPES = DTYPES | {"bfloat16": "BF16"}
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
_ARCHIVE = b"PK\x03\x04"
# A member that only TorchScript's archives have.
_TORCHSCRIPT = "/constants.pkl"


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
    """Open a file of weights; its first bytes tell whose it is, unless it is called ``.safetensors``.

    Args:
        path: the file, or the list of several (``.index.json``).

    Raises:
        UserError: it is missing or not readable; PyTorch's file holds anything but plain data beside its weights, or no
            state dict of plain tensors, or is a TorchScript archive; numpy's holds anything but arrays of numbers; or a
            list and its files do not belong together.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return ListedWeights(path, open_weights) if is_list(path) else _reader_of(path)(path)


def _reader_of(path: Path) -> Callable[[Path], StoredWeights]:
    # What is called so, torch.load itself gives to safetensors.
    if path.suffix == ".safetensors":
        return _SafetensorsWeights
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_ARCHIVE):
        return NpzWeights if path.suffix == ".npz" or _has_member(path, NPY) else _TorchWeights
    # The length of safetensors' header comes first, and may begin as pickle does.
    if start[8:] == b"{":
        return _SafetensorsWeights
    # What is damaged or empty is told under the name that it has.
    if start.startswith(pickle.PROTO) or path.suffix in _READ_BY_TORCH:
        return _TorchWeights
    return NpzWeights if path.suffix == ".npz" else _SafetensorsWeights


def _has_member(path: Path, end: str) -> bool:
    """Whether an archive, which may be damaged, has a file whose name ends so."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(end) for name in archive.namelist())
    except Exception:
        return False


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
        # Otherwise it would be mapped to the file, and whoever writes into it would keep that in memory.
        tensor: Tensor = self._file.get_tensor(name).clone()
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
        word = str(self._state[name].dtype).removeprefix("torch.")
        return _DTYPES.get(word, word)

    def read(self, name: str) -> Tensor:
        # What the file is mapped to would change with the file.
        return self._state[name].detach().clone()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._state[name].detach()[start:stop].clone()


class _Aside:
    """Stands for an object beside the weights of a training's checkpoint, whose own code is never run."""

    def __new__(cls, *arguments: object) -> "_Aside":
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What MAE, DeiT (arguments, best accuracy) and Swin (configuration) save beside the weights.
_ASIDE = (
    (_Aside, "argparse.Namespace"),
    (_Aside, "numpy.core.multiarray.scalar"),
    (_Aside, "numpy._core.multiarray.scalar"),
    (_Aside, "numpy.dtype"),
    (OrderedDict, "yacs.config.CfgNode"),
)


def _load(path: Path) -> Any:
    is_archive = zipfile.is_zipfile(path)
    if is_archive and _has_member(path, _TORCHSCRIPT):
        raise UserError(
            f"{path}: a TorchScript archive, which holds a program, as OpenAI's CLIP files do; take the same weights "
            "as Hugging Face (openai/clip-vit-...) or timm (vit_..._clip_....openai) publish them"
        )
    try:
        # Files from before PyTorch 1.6 are no archives, and can only be read whole.
        with torch.serialization.safe_globals(list(_ASIDE)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    # A damaged file meets torch's reader in a dozen ways.
    except Exception as error:
        refused = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise UserError(
                f"{path}: not a readable PyTorch file ({type(error).__name__}); it may be truncated"
            ) from error
        raise UserError(
            f"{path}: holds {refused[1]} beside its weights, and reading such objects can run any code. If you trust "
            "where it comes from, load it in Python with torch.load(..., weights_only=False) and write the state dict "
            "in it, alone, with torch.save"
        ) from error


def _find_state(path: Path, content: Any) -> dict[str, Tensor]:
    key = None
    if isinstance(content, dict):
        key = next((key for key in _STATE_KEYS if isinstance(content.get(key), dict)), None)
    found = content if key is None else content[key]
    if not _is_state(found):
        keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, dict) else type(found).__name__
        raise UserError(
            f"{path}: no state dict (name -> tensor), neither bare nor under {', '.join(_STATE_KEYS)}; found {keys}"
        )
    for name, tensor in found.items():
        _check_plain(path, name, tensor)
    others = [str(other) for other, value in content.items() if other != key and _is_state(value) and value]
    if others:
        _logger.info("%s: took the weights under %s, not those under %s", path, key, ", ".join(others))
    state: dict[str, Tensor] = found
    return state


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())


def _check_plain(path: Path, name: object, tensor: Tensor) -> None:
    if not isinstance(name, str):
        raise UserError(f"{path}: a tensor is named {name!r}, which is no text; save it with the names of the model's")
    kinds = {
        "a sparse tensor": tensor.layout != torch.strided,
        "a tensor without numbers, on torch's meta device": tensor.is_meta,
        "a quantised tensor": tensor.is_quantized,
    }
    kind = next((kind for kind, is_so in kinds.items() if is_so), None)
    if kind:
        raise UserError(f"{path}: {name} is {kind}; save the numbers themselves, dense")
