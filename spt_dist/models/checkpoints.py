"""Reading pre-trained weights, with every key accounted for."""

import logging
from collections.abc import Callable, Collection, Iterable
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spt_dist.errors import UserError
from spt_dist.files import load_tensors
from spt_dist.models.matrices import SEGMENTATION_HEADS, find_heads, in_modules, own_name_of
from spt_dist.models.mmseg_names import BACKBONE_PREFIX, MMSEG, POOLING, USUAL_HEADS, naming_of, to_timm
from spt_dist.models.positions import square_grid
from spt_dist.models.sharded import own_rows, whole_shape
from spt_dist.models.weight_files import open_weights

_log = logging.getLogger(__name__)
PACKAGE_SCHEME = "package://"


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
        raise UserError(f"model.checkpoint={location!r}: no such file; give the path of a safetensors or PyTorch file")
    return path


class WeightsFile:
    """The state dict of a pre-trained model, read tensor by tensor or row by row.

    A ViT's may have timm's names or mmseg's, with or without ``backbone.`` before them: ``check`` finds out.
    """

    def __init__(self, location: str) -> None:
        """``location``: a path, or ``package://NAME``; see ``open_weights`` for the kinds of files.

        Raises:
            UserError: there is no such file, or it is not readable.
        """
        self.path = resolve_checkpoint(location)
        self._file = open_weights(self.path)
        self._places: dict[str, str] = {}
        self._fits: dict[str, Callable[[Tensor], Tensor]] = {}

    def check(self, model: nn.Module) -> None:
        """Refuse a file that does not hold exactly the model's backbone; take its position embeddings as they fit.

        ``TimmVisionTransformer`` takes those of any square grid of patches, every other model only its own.

        Raises:
            UserError: a backbone key is missing, left over or of another shape.
        """
        wanted = {name: whole_shape(tensor) for name, tensor in backbone_state(model).items()}
        pairs = self._pair_names(model, wanted.keys())
        self._places = {name: own_name for name, own_name in pairs if name in wanted}
        missing = sorted(wanted.keys() - self._places.keys())
        unexpected = sorted(own_name for name, own_name in pairs if self._places.get(name) != own_name)
        if missing or unexpected:
            raise UserError(
                f"{self.path}: does not fit this backbone: {len(missing)} of {len(wanted)} keys are missing "
                f"(first: {missing[:1]}), {len(unexpected)} are unexpected (first: {unexpected[:1]})"
            )
        fit = getattr(_backbone_of(model), "fit_pos_embed", None)
        self._fits = {}
        for name, shape in wanted.items():
            found = self._file.shape(self._places[name])
            if found == shape:
                continue
            if fit is None or own_name_of(name) != "pos_embed" or found[2:] != shape[2:] or not square_grid(found):
                raise UserError(
                    f"{self.path}: {name} has shape {found}, the model needs {shape}; check model.name and model.kwargs"
                )
            self._fits[name] = fit
            _log.info("%s: %s of shape %s is resampled to %s", self.path, name, found, shape)

    def _pair_names(self, model: nn.Module, wanted: Collection[str]) -> list[tuple[str, str]]:
        """The model's name and the file's own of everything in the file that is not known to belong to a head."""
        heads = find_heads(model)
        names = {name: name for name in self._file.names() if not in_modules(name, heads)}
        if naming_of(names) == MMSEG:
            try:
                names = to_timm(names)
            except UserError as error:
                raise UserError(f"{self.path}: {error}") from error
        prefix = _prefix_of(wanted)
        is_bare = not any(name.startswith(BACKBONE_PREFIX) for name in names)
        # The file may hold a head that the model lacks. Not everything under `head` is one: ConvNeXt's norm isn't.
        ignored: tuple[str, ...] = USUAL_HEADS + SEGMENTATION_HEADS
        if hasattr(_backbone_of(model), "fit_pos_embed"):
            # Its maps may be taken before the last norm, and never go through what pools a classifier's features.
            ignored += ("norm", *POOLING)
        pairs = []
        for name, own_name in names.items():
            inner = name.removeprefix(BACKBONE_PREFIX)
            model_name = prefix + inner if is_bare or inner != name else name
            if model_name in wanted or not in_modules(inner, ignored):
                pairs.append((model_name, own_name))
        return pairs

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, by the name that the model of ``check`` has for it."""
        tensor = self._file.read(self._places[name])
        return self._fits[name](tensor) if name in self._fits else tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start .. stop`` of one tensor, on the CPU; nothing else of it is read, unless it is resampled."""
        if name in self._fits:
            return self.read(name)[start:stop]
        return self._file.read_rows(self._places[name], start, stop)


def _prefix_of(names: Iterable[str]) -> str:
    return BACKBONE_PREFIX if any(name.startswith(BACKBONE_PREFIX) for name in names) else ""


def _backbone_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(_prefix_of(name for name, _ in model.named_parameters()).rstrip("."))


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of everything but the head, the model's own: name -> tensor."""
    heads = find_heads(model)
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not in_modules(name, heads)}


@torch.no_grad()
def load_backbone(model: nn.Module, location: str) -> None:
    """Load a state dict into everything but the head.

    Of a model that FSDP2 has sharded each rank reads its own rows only.

    Args:
        model: a classifier, a segmentor or a backbone; a head stays as it is.
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
