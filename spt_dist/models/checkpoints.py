"""Reading pre-trained weights, with every key accounted for."""

from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spt_dist.errors import UserError
from spt_dist.files import load_tensors
from spt_dist.models.matrices import find_heads, in_modules

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


def load_backbone(model: nn.Module, location: str) -> None:
    """Load a safetensors state dict into everything but the head.

    Args:
        model: a classifier whose head stays as it is.
        location: a path, or ``package://NAME``.

    Raises:
        UserError: a backbone key is missing, left over or of another shape; or the file is not readable.
    """
    path = resolve_checkpoint(location)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    load_backbone_state(model, state, source=str(path))


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


def load_backbone_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """As ``load_backbone``, from a state dict in memory; ``source`` names it in errors."""
    heads = find_heads(model)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not in_modules(name, heads)}
    # The file may hold a head that the model lacks. Not everything under `head` is one: ConvNeXt's norm isn't.
    given = {
        name: tensor
        for name, tensor in state.items()
        if not in_modules(name, heads) and (name in wanted or not in_modules(name, USUAL_HEADS))
    }
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unexpected:
        raise UserError(
            f"{source}: does not fit this backbone: {len(missing)} of {len(wanted)} keys are missing "
            f"(first: {missing[:1]}), {len(unexpected)} are unexpected (first: {unexpected[:1]})"
        )
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(given[name].shape)}, the model needs {tuple(tensor.shape)}; "
                "check model.name and model.kwargs"
            )
    model.load_state_dict(given, strict=False)
