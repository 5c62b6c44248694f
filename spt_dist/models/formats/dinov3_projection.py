"""DINOv3's query, key and value as timm has them: one layer, and beside it biases of query and value, or none.

The key's bias is masked out in training. The others exist, but came out as zero in most of the published files, so timm
has a model without any beside each with them (``_qkvb``).
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.models.formats.joining import QKV_JOINED
from spt_dist.models.formats.rearrange import joined
from spt_dist.models.formats.source import Draft, Shape


def has_biases(wanted: Mapping[str, Shape], block: str) -> bool:
    """Whether the model has them in a block ("blocks.0."), or none is wanted in particular."""
    return not wanted or f"{block}attn.q_bias" in wanted


def take_projection(
    draft: Draft, block: str, weights: Sequence[str], zeros: Mapping[str, Sequence[tuple[int, int]]]
) -> None:
    """Take the layer's weight.

    Args:
        draft: that has it.
        block: before timm's names of the block ("blocks.0.").
        weights: the layer's rows, ``(3 * D, D)`` in all.
        zeros: biases that the model has not: their tensors -> runs of entries, which have to be zero.
    """
    shape = (sum(draft.shapes[name][0] for name in weights), *draft.shapes[weights[0]][1:])
    how = [QKV_JOINED] * (len(weights) > 1) + ["biases have to be zero"] * bool(zeros)
    make = _ZeroBiases(len(weights), zeros) if how else None
    draft.make(f"{block}attn.qkv.weight", [*weights, *zeros], shape, make, ", ".join(how))


class _ZeroBiases:
    """Joins a layer's rows if its biases, which come behind them, are zero."""

    def __init__(self, num_weights: int, zeros: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        self._num_weights = num_weights
        self._zeros = zeros

    def __call__(self, *values: Tensor) -> Tensor:
        for (name, runs), bias in zip(self._zeros.items(), values[self._num_weights :], strict=True):
            if any(bias[start:stop].any() for start, stop in runs):
                raise UserError(
                    f"{name} is not zero, and the model has no such bias; take timm's model with _qkvb behind its name"
                )
        return joined(*values[: self._num_weights])
