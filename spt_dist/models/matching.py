"""Which tensor of a checkpoint is which of a model, head or no head, with or without ``backbone.`` before the names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from spt_dist.errors import UserError
from spt_dist.models.fits import Fit, find_fit
from spt_dist.models.formats import Shape, Source, Translation
from spt_dist.models.matrices import SEGMENTATION_HEADS, find_heads, in_modules, own_name_of
from spt_dist.models.mmseg_names import BACKBONE_PREFIX, POOLING, USUAL_HEADS
from spt_dist.models.sharded import whole_shape

_PATCHES = "patch_embed.proj.weight"
_NORM, _POOLED_NORM = "norm", "fc_norm"


@dataclass(frozen=True)
class Match:
    """What a model takes from a file.

    Attributes:
        sources: the model's name -> what its tensor is made of; nothing but a head that the file is not asked for is
            left out.
        fits: the model's name -> what makes the tensor fit, where it has to.
        left: the file's name -> why the model does not need it.
    """

    sources: dict[str, Source]
    fits: dict[str, Fit]
    left: dict[str, str]


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Shapes of everything in the state dict, also where it is spread over the ranks."""
    return {name: whole_shape(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def bare_shapes(model: nn.Module) -> dict[str, Shape]:
    """As ``shapes_of``, without ``backbone.`` before the names."""
    shapes = shapes_of(model)
    return {name.removeprefix(_prefix_of(shapes)): shape for name, shape in shapes.items()}


def match_tensors(translation: Translation, model: nn.Module, keep_head: bool) -> Match:
    """Find the file's tensors for each of the model's.

    Args:
        translation: of the file, for this model.
        model: a classifier, a segmentor or a backbone, also on torch's meta device.
        keep_head: whether the head is taken from the file.

    Raises:
        UserError: a key is missing, left over or of a shape that can't be made to fit. It does not name the file.
    """
    heads = find_heads(model)
    wanted = {name: shape for name, shape in shapes_of(model).items() if keep_head or not in_modules(name, heads)}
    found, rest = _pair_names(translation.sources, wanted)
    found |= _fresh_pooled_norm(found, rest, wanted)
    left, unexpected = _explain(rest, model, keep_head, wanted)
    missing = sorted(wanted.keys() - found.keys())
    if missing and not unexpected and all(in_modules(name, heads) for name in missing):
        raise _no_head(missing[0], translation)
    if missing or unexpected:
        raise UserError(
            f"read as {translation.format}'s, it does not fit this backbone: {len(missing)} of {len(wanted)} keys are "
            f"missing (first: {missing[:1]}), {len(unexpected)} are unexpected (first: {sorted(unexpected)[:1]})"
        )
    sources = {name: found[name] for name in wanted}
    return Match(sources, dict(_find_fits(sources, model, wanted)), translation.unused | left)


def backbone_of(model: nn.Module) -> nn.Module:
    """A segmentor's backbone; any other model itself."""
    return model.get_submodule(_prefix_of(name for name, _ in model.named_parameters()).rstrip("."))


def _prefix_of(names: Iterable[str]) -> str:
    return BACKBONE_PREFIX if any(name.startswith(BACKBONE_PREFIX) for name in names) else ""


def _pair_names(
    sources: Mapping[str, Source], wanted: Mapping[str, Shape]
) -> tuple[dict[str, Source], dict[str, Source]]:
    """Sources by the model's names, and those that the model has no name for by the format's."""
    prefix = _prefix_of(wanted)
    is_bare = not any(name.startswith(BACKBONE_PREFIX) for name in sources)
    found: dict[str, Source] = {}
    rest: dict[str, Source] = {}
    for name, source in sources.items():
        inner = name.removeprefix(BACKBONE_PREFIX)
        own = prefix + inner if is_bare or inner != name else name
        if own in wanted and own not in found:
            found[own] = source
        else:
            rest[name] = source
    return found, rest


def _fresh_pooled_norm(
    found: Mapping[str, Source], rest: Mapping[str, Source], wanted: Mapping[str, Shape]
) -> dict[str, Source]:
    """A norm behind the pooling where the file has one before it only, as MAE's has: it starts at (1, 0)."""
    pooled = {name for name in wanted if in_modules(name, [_POOLED_NORM])}
    if pooled & found.keys() or not any(in_modules(name, [_NORM]) for name in rest):
        return {}
    start = {"weight": 1.0, "bias": 0.0}
    values = {name: start[own_name_of(name)] for name in pooled}
    return {
        name: Source((), wanted[name], partial(torch.full, wanted[name], value), f"starts at {value:.0f}")
        for name, value in values.items()
    }


def _explain(
    rest: Mapping[str, Source], model: nn.Module, keep_head: bool, wanted: Mapping[str, Shape]
) -> tuple[dict[str, str], list[str]]:
    """The file's names that the model has no place for: why, and those that nothing explains."""
    heads = find_heads(model)
    reasons = dict.fromkeys(heads, "head" if keep_head else "head; model.keep_head=True takes it")
    # The file may hold a head that the model lacks. Not everything under `head` is one: ConvNeXt's norm isn't.
    reasons |= {head: reasons.get(head, "head") for head in USUAL_HEADS + SEGMENTATION_HEADS}
    if hasattr(backbone_of(model), "fit_pos_embed"):
        # Its maps may be taken before the last norm, and never go through what pools a classifier's features.
        reasons |= dict.fromkeys((_NORM, *POOLING), "behind the maps that a segmentor takes")
    elif any(in_modules(name, [_POOLED_NORM]) for name in wanted):
        reasons[_NORM] = "norm before the pooling; this model has fc_norm behind it"
    left: dict[str, str] = {}
    unexpected: list[str] = []
    for name, source in rest.items():
        inner = name.removeprefix(BACKBONE_PREFIX)
        why = next((reason for module, reason in reasons.items() if in_modules(inner, [module])), None)
        if why is None:
            unexpected += source.names
        else:
            left |= dict.fromkeys(source.names, why)
    return left, unexpected


def _no_head(missing: str, translation: Translation) -> UserError:
    left = [f"{name}: {why}" for name, why in translation.unused.items() if "head" in name + why or "proj" in name]
    return UserError(
        f"holds no {missing}, which model.keep_head=True takes from there"
        + (f" (left out is {left[0]})" if left else "")
        + "; leave keep_head out for a fresh head"
    )


def _find_fits(
    sources: Mapping[str, Source], model: nn.Module, wanted: Mapping[str, Shape]
) -> Iterator[tuple[str, Fit]]:
    prefix, heads, backbone = _prefix_of(wanted), find_heads(model), backbone_of(model)
    patches = sources.get(prefix + _PATCHES)
    patch = (patches.shape[2], patches.shape[3]) if patches is not None and len(patches.shape) == 4 else None
    for name, shape in wanted.items():
        found, is_head = sources[name].shape, in_modules(name, heads)
        fit = find_fit(backbone, name.removeprefix(prefix), found, shape, patch)
        if fit is not None:
            yield name, fit
        elif found != shape and is_head and found[1:] == shape[1:]:
            raise UserError(
                f"its head is for {found[0]} classes ({name}), but model.num_classes={shape[0]}; make them agree, or "
                "leave out model.keep_head for a fresh head"
            )
        elif found != shape:
            raise UserError(f"{name} has shape {found}, the model needs {shape}; check model.name and model.kwargs")
