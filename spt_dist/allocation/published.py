"""Allocations that SPT's authors published: the ``param_req_*.pth`` files of github.com/ziplab/SPT.

They hold what stage 1 of the published code chose for a ViT-B/16 with separate query, key and value projections, whose
parameter names are our logical names. They are pickles, so they are read with torch's ``weights_only`` loader: it
builds plain containers, numbers and tensors, calls nothing that is not on a list, and refuses all else. The integers
among them were numpy's when they were saved; the stand-ins below read them without calling numpy.
"""

from collections import Counter
from collections.abc import Callable
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from spt_dist.allocation.kinds import PRESETS, structured_cost
from spt_dist.errors import UserError

RANK = 8
PUBLISHED_KINDS = ("lora", "adapter")
# The file has neither the shapes of structured matrices nor the model's name: the published code knows ViT-B/16 only.
NUM_BLOCKS, WIDTH, HIDDEN = 12, 768, 3072
BACKBONE_SIZE = 85_798_656
CLS_TOKEN_SHAPE = (1, 1, WIDTH)
# In the order of a row of `tuned_matrices`, as (out_features, in_features).
OPERATIONS = {
    **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.proj"), (WIDTH, WIDTH)),
    "mlp.fc1": (HIDDEN, WIDTH),
    "mlp.fc2": (WIDTH, HIDDEN),
}


def read_allocation(path: str | Path) -> dict[str, Any]:
    """The fields of a ``Plan`` out of a published file, see ``Plan.from_spt_release``."""
    path = Path(path)
    content = _load(path)
    _check_form(path, content)
    matrices = [
        f"blocks.{block}.{operation}.weight"
        for block, flags in enumerate(content["tuned_matrices"])
        for operation, flag in zip(OPERATIONS, flags, strict=True)
        if flag
    ]
    vectors = content["tuned_vectors"]
    names = list(content["unstructured_name_shapes"])
    kind = _kind_of(path, matrices, vectors, content["structured_params"])
    _check_agreement(path, content, [*matrices, *vectors, *names])
    sparse = _split(content["unstructured_indexes"], names)
    released = PRESETS["released"]
    return {
        "matrices": dict.fromkeys(matrices, kind),
        "vectors": vectors,
        "sparse": sparse,
        "parameters": ["cls_token"],
        "head": ["head.weight", "head.bias"],
        "shapes": {"cls_token": CLS_TOKEN_SHAPE, **{name: SHAPES[name] for name in (*matrices, *vectors, *sparse)}},
        "rank": RANK,
        "method": f"spt-{kind}" if kind else "spt",
        "backbone_size": BACKBONE_SIZE,
        "options": {
            "preset": "released",
            "structured": kind,
            "alpha": released.alpha,
            "beta": released.beta,
            "source": path.name,
        },
    }


class _Int64Type:
    """Stands in for ``numpy.dtype`` while a file is read."""

    def __init__(self, code: str, align: bool, copy: bool) -> None:
        if code != "i8":
            raise ValueError(f"numpy numbers of type {code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise ValueError(f"numpy numbers with byte order {state[1]!r}")


def _int64(dtype: _Int64Type, data: bytes) -> int:
    """Stands in for ``numpy.core.multiarray.scalar`` while a file is read."""
    if not isinstance(dtype, _Int64Type) or len(data) != 8:
        raise ValueError("a numpy number that is no int64")
    return int.from_bytes(data, "little", signed=True)


# Beyond what torch's loader allows by itself. numpy 2 has renamed numpy.core.
_ALLOWED: list[Callable | tuple[Callable, str]] = [
    (_Int64Type, "numpy.dtype"),
    (_int64, "numpy.core.multiarray.scalar"),
    (_int64, "numpy._core.multiarray.scalar"),
]


def _load(path: Path) -> Any:
    """What the file holds, tensors on the CPU; nothing of it is checked but that it is harmless."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an allocation published with SPT (param_req_*.pth)")
    try:
        with safe_globals(_ALLOWED):
            refused = get_unsafe_globals_in_checkpoint(str(path))
            if not refused:
                return torch.load(path, map_location="cpu", weights_only=True)
    # A file made by hand can make the loader fail anyhow.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more is known'}"
        raise UserError(
            f"{path}: not readable as an allocation published with SPT; it may be truncated or another file ({reason})"
        ) from error
    raise UserError(
        f"{path}: not read, since it refers to {', '.join(sorted(refused))}, as no allocation published with SPT does; "
        "get the file from github.com/ziplab/SPT"
    )


def _vit_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that the published code chooses from."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(NUM_BLOCKS):
        for operation, shape in OPERATIONS.items():
            shapes[f"blocks.{block}.{operation}.weight"] = shape
            shapes[f"blocks.{block}.{operation}.bias"] = shape[:1]
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.weight": (WIDTH,), f"blocks.{block}.{norm}.bias": (WIDTH,)}
    return shapes | {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}


SHAPES = _vit_shapes()


def _is_tensor(value: Any, dtype: torch.dtype, ndim: int) -> bool:
    # Contiguous: no small storage that claims to be a huge tensor.
    return (
        type(value) is Tensor
        and (value.dtype, value.ndim, value.device.type) == (dtype, ndim, "cpu")
        and value.layout == torch.strided
        and value.is_contiguous()
    )


def _is_vector_name(value: Any) -> bool:
    return isinstance(value, str) and len(SHAPES.get(value, ())) == 1


def _are_flags(value: Any) -> bool:
    return isinstance(value, list) and all(type(flag) is int and flag in (0, 1) for flag in value)


# Key of the file -> what it has to hold, in words and as a check.
_FORM: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "unstructured_name_shapes": (
        "the shapes of weights of a ViT-B/16",
        lambda value: isinstance(value, dict) and all(SHAPES.get(name) == shape for name, shape in value.items()),
    ),
    "unstructured_name_shapes_int": (
        "the sizes of weights of a ViT-B/16",
        lambda value: (
            isinstance(value, dict)
            and all(type(size) is int and prod(SHAPES.get(name, (0,))) == size for name, size in value.items())
        ),
    ),
    "params": ("one float32 number", lambda value: _is_tensor(value, torch.float32, 0)),
    "unstructured_params": ("one float32 number", lambda value: _is_tensor(value, torch.float32, 0)),
    "structured_params": ("an integer", lambda value: type(value) is int),
    "unstructured_indexes": ("int64 positions", lambda value: _is_tensor(value, torch.int64, 1)),
    "tuned_matrices": (
        f"{NUM_BLOCKS} lists of {len(OPERATIONS)} flags",
        lambda value: (
            isinstance(value, list)
            and len(value) == NUM_BLOCKS
            and all(_are_flags(flags) and len(flags) == len(OPERATIONS) for flags in value)
        ),
    ),
    "tuned_vectors": (
        "the names of vectors of a ViT-B/16",
        lambda value: isinstance(value, list) and all(_is_vector_name(name) for name in value),
    ),
}


def _check_form(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or content.keys() != _FORM.keys():
        found = f"the keys {[*content]!s:.200}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f"{path}: no allocation published with SPT: it holds {found}, not the keys {', '.join(_FORM)}")
    for key, (expected, fits) in _FORM.items():
        if not fits(content[key]):
            raise UserError(
                f"{path}: {key} has to hold {expected}, but is {str(content[key])[:80]!r}; only the allocations "
                "published for a ViT-B/16 can be read"
            )


def _kind_of(path: Path, matrices: list[str], vectors: list[str], structured_params: int) -> str | None:
    """The kind of the structured modules: the one at whose cost the file arrives at its ``structured_params``.

    ``None`` where there is no matrix. The costs of both kinds are the same for no other set of matrices.
    """
    in_vectors = sum(prod(SHAPES[name]) for name in vectors)
    totals = {
        kind: sum(structured_cost(kind, SHAPES[name], RANK) for name in matrices) + in_vectors
        for kind in PUBLISHED_KINDS
    }
    for kind, total in totals.items():
        if total == structured_params:
            return kind if matrices else None
    costs = " or ".join(f"{total:,} ({kind})" for kind, total in totals.items())
    raise UserError(
        f"{path}: damaged: structured_params is {structured_params:,}, but its {len(matrices)} matrices and "
        f"{len(vectors)} vectors cost {costs} at rank {RANK}"
    )


def _check_agreement(path: Path, content: dict[str, Any], names: list[str]) -> None:
    """Whether the parts of the file fit together; ``names``: all that it names."""

    def require(condition: bool, complaint: str) -> None:
        if not condition:
            raise UserError(f"{path}: damaged: {complaint}")

    indexes = content["unstructured_indexes"]
    sizes = content["unstructured_name_shapes_int"]
    repeated = [name for name, times in Counter(names).items() if times > 1]
    require(not repeated, f"{', '.join(repeated)} would be tuned in more than one way")
    require(
        sizes.keys() == content["unstructured_name_shapes"].keys(),
        "unstructured_name_shapes and unstructured_name_shapes_int name different weights",
    )
    said, found, size = content["unstructured_params"].item(), len(indexes), sum(sizes.values())
    require(said == found, f"unstructured_params is {said:,.0f}, but there are {found:,} unstructured_indexes")
    # One position before and one behind all of them bound the others.
    bounded = torch.cat([torch.tensor([-1]), indexes, torch.tensor([size])])
    require(
        bool((bounded.diff() > 0).all()),
        f"unstructured_indexes have to be ascending positions in the {size:,} unstructured weights",
    )
    total = content["structured_params"] + found + prod(CLS_TOKEN_SHAPE)
    millions = content["params"].item()
    # A float32 of millions is good to a tenth of a parameter.
    require(
        abs(millions * 1e6 - total) <= 2, f"params is {millions:.6f} million, but its parts make {total:,} parameters"
    )


def _split(positions: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Ascending flat positions in the concatenation of ``names``, as flat positions in each that has any."""
    bounds = list(accumulate((prod(SHAPES[name]) for name in names), initial=0))
    cuts = torch.searchsorted(positions, torch.tensor(bounds)).tolist()
    return {
        name: positions[first:last] - start
        for name, start, (first, last) in zip(names, bounds[:-1], pairwise(cuts), strict=True)
        if last > first
    }
