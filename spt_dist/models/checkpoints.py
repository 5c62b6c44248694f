"""Reading pre-trained weights, with every key accounted for."""

import hashlib
import logging
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spt_dist.errors import UserError
from spt_dist.files import load_tensors
from spt_dist.models.accounts import Account, Row
from spt_dist.models.formats import Shape, Translation, translate
from spt_dist.models.matching import Match, backbone_of, bare_shapes, match_tensors, shapes_of
from spt_dist.models.matrices import find_heads, in_modules
from spt_dist.models.sharded import own_rows
from spt_dist.models.weight_files import open_weights
from spt_dist.models.weight_lists import files_of

_log = logging.getLogger(__name__)
PACKAGE_SCHEME = "package://"
_BLOCK_OF_FILE = 2**20
# As ``StoredWeights.dtype`` names them.
_FLOATING = ("F64", "F32", "F16", "BF16")


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
        raise UserError(f"model.checkpoint={location!r}: no such file; give the path of a file of weights")
    return path


def check_sum(location: str, sha256: str) -> str:
    """Refuse a file that is not the one that is meant. It is read once, in blocks of 1 MiB.

    Args:
        location: a path, or ``package://NAME``. The sum of a list of files is that of the files that it names, one
            after another in the order of their names.
        sha256: hexadecimal digits that the file's SHA-256 has to begin with, in upper or lower case.

    Returns:
        All of its digits.

    Raises:
        UserError: there is no such file, or its SHA-256 is another.
    """
    path = resolve_checkpoint(location)
    digest = hashlib.sha256()
    for part in files_of(path):
        with part.open("rb") as file:
            while block := file.read(_BLOCK_OF_FILE):
                digest.update(block)
    if not digest.hexdigest().startswith(sha256.lower()):
        raise UserError(
            f"{path}: its SHA-256 is {digest.hexdigest()}, but model.sha256={sha256!r}; get the file anew, or correct "
            "model.sha256"
        )
    return digest.hexdigest()


class WeightsFile:
    """The state dict of a pre-trained model, read tensor by tensor or row by row.

    It may be in any format that ``models.formats`` knows, with or without ``backbone.`` before its names: ``check``
    finds out.
    """

    def __init__(self, location: str) -> None:
        """``location``: a path, or ``package://NAME``; see ``open_weights`` for the kinds of files.

        Raises:
            UserError: there is no such file, or it is not readable.
        """
        self.path = resolve_checkpoint(location)
        self._file = open_weights(self.path)
        self._match = Match({}, {}, {})

    def check(self, model: nn.Module, keep_head: bool = False) -> Account:
        """Refuse a file that does not hold exactly the model's backbone; tensors that ``find_fit`` makes fit are taken.

        Args:
            model: a classifier, a segmentor or a backbone, also on torch's meta device.
            keep_head: whether the head is taken from the file too.

        Returns:
            What becomes of each tensor of the file, and where the model's come from.

        Raises:
            UserError: a key is missing, left over, of a shape that can't be made to fit, or not of floating-point
                numbers.
        """
        try:
            has_class_position = not getattr(backbone_of(model), "no_embed_class", False)
            translation = translate(self._file, bare_shapes(model), has_class_position=has_class_position)
            self._match = match_tensors(translation, model, keep_head)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        self._refuse_other_numbers(model)
        shapes = shapes_of(model)
        for name, fit in self._match.fits.items():
            if self._match.sources[name].shape == shapes[name]:
                # Which grid a file's positions are of stands nowhere in it.
                _log.warning("%s: %s has the right shape and is %s all the same", self.path, name, fit.how)
        return self._account(translation, shapes)

    def survey(self) -> Account:
        """What is in the file, for no model in particular: everything but what no model of its kind needs."""
        try:
            translation = translate(self._file, {})
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        self._match = Match(translation.sources, {}, translation.unused)
        return self._account(translation, {name: source.shape for name, source in translation.sources.items()})

    def taken(self) -> list[str]:
        """The model's names of what can be read since ``check``, in the model's order."""
        return list(self._match.sources)

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, by the name that the model of ``check`` has for it.

        Raises:
            UserError: it holds NaN or infinity, or what the model has no place for.
        """
        source = self._match.sources[name]
        tensors = [self._file.read(own_name) for own_name in source.names]
        try:
            tensor = tensors[0] if source.make is None else source.make(*tensors)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        assert tuple(tensor.shape) == source.shape, f"{name} is made of {source.names}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{self.path}: {source.names[0]} holds NaN or infinity; get the file anew")
        return self._match.fits[name].make(tensor) if name in self._match.fits else tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start .. stop`` of one tensor, on the CPU; if it is taken as it is, nothing else of it is read."""
        source = self._match.sources[name]
        if source.make is None and name not in self._match.fits:
            return self._file.read_rows(source.names[0], start, stop)
        return self.read(name)[start:stop]

    def _refuse_other_numbers(self, model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True)
        for name, source in self._match.sources.items():
            for own_name in source.names:
                dtype = self._file.dtype(own_name)
                if state[name].is_floating_point() and dtype not in _FLOATING:
                    raise UserError(
                        f"{self.path}: {own_name} is {dtype}, but the model's {name} is of floating-point numbers "
                        f"({', '.join(_FLOATING)}); give a file that was not quantised"
                    )

    def _account(self, translation: Translation, wanted: Mapping[str, Shape]) -> Account:
        rows = [self._row(name, shape) for name, shape in wanted.items()]
        for name in self._file.names():
            if name in self._match.left:
                rows.append(Row((name,), (self._file.shape(name),), None, None, self._match.left[name]))
        return Account(self.path, translation.format, tuple(rows))

    def _row(self, name: str, shape: Shape) -> Row:
        source = self._match.sources.get(name)
        if source is None:
            return Row((), (), name, shape, "not from the file")
        fit = self._match.fits.get(name)
        how = ", ".join(filter(None, [source.how, fit.how if fit else ""]))
        return Row(source.names, tuple(self._file.shape(own_name) for own_name in source.names), name, shape, how)


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of everything but the head, the model's own: name -> tensor."""
    heads = find_heads(model)
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not in_modules(name, heads)}


def load_backbone(model: nn.Module, location: str, keep_head: bool = False) -> None:
    """Load a state dict into everything but the head, and log what became of its tensors.

    Of a model that FSDP2 has sharded each rank reads its own rows only.

    Args:
        model: a classifier, a segmentor or a backbone.
        location: a path, or ``package://NAME``.
        keep_head: whether the head is loaded too; otherwise it stays as it is.

    Raises:
        UserError: a key is missing, left over or of a shape that can't be made to fit; or the file is not readable.
    """
    weights = WeightsFile(location)
    log_account(weights.check(model, keep_head))
    copy_weights(model, weights)


def log_account(account: Account) -> None:
    """Log the table of a checkpoint that is being loaded."""
    _log.info("%s", account.table())


@torch.no_grad()
def copy_weights(model: nn.Module, weights: WeightsFile) -> None:
    """Copy what ``weights.check`` has found for a model into it, tensor by tensor.

    Of a model that FSDP2 has sharded since each rank reads its own rows only.
    """
    state = model.state_dict(keep_vars=True)
    for name in weights.taken():
        tensor = state[name]
        if isinstance(tensor, DTensor):
            rows = own_rows(tensor)
            tensor.to_local().copy_(weights.read_rows(name, rows.start, rows.stop))
        else:
            tensor.copy_(weights.read(name))


def load_merged(model: nn.Module, location: str | Path) -> None:
    """Load a whole merged checkpoint, head included, into a model of the same architecture.

    Raises:
        UserError: the file is missing or of another kind; or its keys or shapes are not the model's.
    """
    state, _ = load_tensors(location, "merged")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{location}: does not fit this model ({str(error).splitlines()[-1].strip()})") from error
