"""The order of rows and columns where only some of a model's parameters are named, and not in its order: in plans."""

from collections.abc import Sequence

from spt_dist.report.grid import Layout, Place, find_places

# Parts of names in the order in which an image passes them, in timm's models. What is not here comes by the alphabet
# between the words of modules and those of parameters.
_BEFORE_BLOCKS = (
    *("cls_token", "reg_token", "dist_token", "mask_token", "pos_embed"),
    *("rel_pos_bias", "patch_embed", "stem", "norm_pre"),
)
_MODULES = (
    *_BEFORE_BLOCKS,
    *("prompt", "norm1", "attn", "q", "k", "v", "qkv", "kv", "q_bias", "v_bias", "proj", "ls1", "gamma_1"),
    *("conv_dw", "norm2", "norm", "mlp", "fc1", "fc2", "ls2", "gamma_2", "gamma", "downsample"),
)
_PARAMETERS = ("weight", "bias")
_FIRST_IN_STAGE = "downsample"


def lay_out_some(names: Sequence[str]) -> Layout:
    """Lay parameters out by operation and block, rows and columns in the usual order whatever that of the names.

    Args:
        names: logical names, of one model or of several.
    """
    places = find_places(names)
    columns = sorted(dict.fromkeys(places), key=_column_key)
    operations = sorted(dict.fromkeys(places), key=_operation_key)
    return Layout.of(
        places,
        list(dict.fromkeys(place.operation for place in operations)),
        list(dict.fromkeys(place.column for place in columns)),
    )


def _column_key(place: Place) -> tuple[int, tuple[float, ...]]:
    """What comes before the blocks; the blocks, with what else their stage has; the rest."""
    stage, _, what = place.column.partition(".")
    if place.block is not None:
        return 1, place.block
    if stage.isdigit():
        return 1, (0, int(stage), -1 if what == _FIRST_IN_STAGE else float("inf"))
    if stage in _BEFORE_BLOCKS:
        return 0, (_BEFORE_BLOCKS.index(stage),)
    return 2, ()


def _operation_key(place: Place) -> tuple[int, list[tuple[int, str]]]:
    group, _ = _column_key(place)
    return group, [_word_key(word) for word in place.operation.removesuffix(" (outside blocks)").split(".")]


def _word_key(word: str) -> tuple[int, str]:
    if word in _MODULES:
        return _MODULES.index(word), ""
    if word in _PARAMETERS:
        return len(_MODULES) + 1 + _PARAMETERS.index(word), ""
    return len(_MODULES), word
