"""Reading pre-trained weights, with every key accounted for."""

from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spt_dist.errors import UserError
from spt_dist.files import load_tensors
from spt_dist.models.matrices import find_heads, in_modules
from spt_dist.models.sharded import own_rows, whole_shape

PACKAGE_SCHEME = "package://"
USUAL_HEADS = ("head", "head_dist", "fc")


def resolve_checkpoint(location: str) -> Path:
    """Turn ``package://NAME`` (a file that ships with spt_dist) or a path into an existing path.

    Raises:
        UserError: there is no such file.
    """
    if location.startswith(PACKAGE_SCHEME):
        path = Path(str(files("spt_dist") / "assets" / location.removeprefix(PACKAGE_SCHEME)))
    else:
        path = Path(location).expanduser()
    if not path.is_file():
        raise UserError(f"model.checkpoint={location!r}: no such file; give the path of a safetensors file")
    return path


class WeightsFile:
    """A safetensors state dict of a pre-trained model, read tensor by tensor or row by row."""

    def __init__(self, location: str) -> None:
        """``location``: a path, or ``package://NAME``.

        Raises:
            UserError: there is no such file, or it is not readable.
        """
        self.path = resolve_checkpoint(location)
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{self.path}: not a readable safetensors file ({error})") from error

    def check(self, model: nn.Module) -> None:
        """Refuse a file that does not hold exactly the model's backbone.

        Raises:
            UserError: a backbone key is missing, left over or of another shape.
        """
        heads = find_heads(model)
        wanted = {name: whole_shape(tensor) for name, tensor in backbone_state(model).items()}
        # The file may hold a head that the model lacks. Not everything under `head` is one: ConvNeXt's norm isn't.
        given = {
            name
            for name in self._file.keys()  # noqa: SIM118
            if not in_modules(name, heads) and (name in wanted or not in_modules(name, USUAL_HEADS))
        }
        missing, unexpected = sorted(wanted.keys() - given), sorted(given - wanted.keys())
        if missing or unexpected:
            raise UserError(
                f"{self.path}: does not fit this backbone: {len(missing)} of {len(wanted)} keys are missing "
                f"(first: {missing[:1]}), {len(unexpected)} are unexpected (first: {unexpected[:1]})"
            )
        for name, shape in wanted.items():
            found = tuple(self._file.get_slice(name).get_shape())
            if found != shape:
                raise UserError(
                    f"{self.path}: {name} has shape {found}, the model needs {shape}; check model.name and model.kwargs"
                )

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start .. stop`` of one tensor, on the CPU; nothing else of it is read."""
        rows: Tensor = self._file.get_slice(name)[start:stop]
        return rows


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of everything but the head, the model's own: name -> tensor."""
    heads = find_heads(model)
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not in_modules(name, heads)}


@torch.no_grad()
def load_backbone(model: nn.Module, location: str) -> None:
    """Load a safetensors state dict into everything but the head.

    Of a model that FSDP2 has sharded each rank reads its own rows only.

    Args:
        model: a classifier whose head stays as it is.
        location: a path, or ``package://NAME``.

    Raises:
        UserError: a backbone key is missing, left over or of another shape; or the file is not readable.
    """
    weights = WeightsFile(location)
    weights.check(model)
    for name, tensor in backbone_state(model).items():
        if isinstance(tensor, DTensor):
            rows = own_rows(tensor)
            tensor.to_local().copy_(weights.read_rows(name, rows.start, rows.stop))
        else:
            tensor.copy_(weights.read(name))


def load_merged(model: nn.Module, location: str) -> None:
    """Load a whole merged checkpoint, head included, into a model of the same architecture.

    Raises:
        UserError: the file is missing or of another kind; or its keys or shapes are not the model's.
    """
    state, _ = load_tensors(location, "merged")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{location}: does not fit this model ({str(error).splitlines()[-1].strip()})") from error
