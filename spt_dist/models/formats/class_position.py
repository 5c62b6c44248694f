"""Position embeddings with and without a row for the class token.

A model adds a position to its class token or has none for it (timm's ``no_embed_class``). Where the file has one and
the model lacks it, the two are added once and for all: the model computes the same.

Shape suffixes: P positions, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isqrt

from torch import Tensor

from spt_dist.models.formats.rearrange import of_shape
from spt_dist.models.formats.source import Draft, Shape, Source, Translation

TOKEN, POSITIONS, REGISTERS = "cls_token", "pos_embed", "reg_token"


def take_in_three_axes(draft: Draft, target: str, name: str) -> None:
    """Take the token ``(D,)`` or the positions ``(P, D)`` as timm has them: ``(1, 1, D)``, ``(1, P, D)``."""
    shape = draft.shapes[name]
    new_shape = (1,) * (3 - len(shape)) + shape
    draft.make(target, [name], new_shape, of_shape(new_shape), "reshaped")


def fit_class_position(translation: Translation, wanted: Mapping[str, Shape], has_class_position: bool) -> Translation:
    """Add the class token's position to it, or drop both, as the model needs.

    Args:
        translation: of any file; one without position embeddings stays as it is.
        wanted: names and shapes of the model's tensors.
        has_class_position: whether the model's position embeddings have a row for its class token.
    """
    token, positions = translation.sources.get(TOKEN), translation.sources.get(POSITIONS)
    if token is None or positions is None or POSITIONS not in wanted:
        return translation
    sources, unused = dict(translation.sources), dict(translation.unused)
    has_row = _has_row(positions.shape, wanted[POSITIONS])
    if TOKEN not in wanted:
        del sources[TOKEN]
        unused |= dict.fromkeys(token.names, "the model has no class token")
    elif has_row and not has_class_position:
        sources[TOKEN] = _add_position(token, positions)
    else:
        return translation
    if has_row:
        sources[POSITIONS] = _without_first(positions)
    return replace(translation, sources=sources, unused=unused)


def _add_position(token: Source, positions: Source) -> Source:
    """The class token ``(1, 1, D)`` and the first of its file's positions ``(1, P, D)``, as one."""
    count = len(token.names)

    def make(*values: Tensor) -> Tensor:
        return _made(token)(*values[:count]) + _made(positions)(*values[count:])[:, :1]

    return Source(token.names + positions.names, token.shape, make, "class position added to the token")


def _without_first(positions: Source) -> Source:
    """The positions ``(1, P, D)`` but the first."""
    first, count, *others = positions.shape

    def make(*values: Tensor) -> Tensor:
        return _made(positions)(*values)[:, 1:].contiguous()

    return Source(positions.names, (first, count - 1, *others), make, "without the class position")


def _made(source: Source) -> Callable[..., Tensor]:
    return source.make or _same


def _same(value: Tensor) -> Tensor:
    return value


def _has_row(shape: Shape, wanted: Shape) -> bool:
    """Whether positions ``(1, P, D)`` of a file have a row before a square grid's, and aren't what is wanted."""
    return len(shape) == 3 and shape != wanted and shape[1] > 1 and isqrt(shape[1]) ** 2 != shape[1]
