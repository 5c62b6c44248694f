"""Kinds of structured modules: what they are put on, what they cost, and how they are set up.

The modules themselves are in ``tuning``; ``tuning.registry.register_structured`` adds a kind from outside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from spt_dist.errors import UserError

# How the modules start: as the backbone's equal (zero update), or with every matrix drawn from a normal distribution.
INITS = ("zero", "normal")


@dataclass(frozen=True)
class StructuredKind:
    """A kind of structured module.

    Attributes:
        cost: trainable parameters of one module, from the shape of what it is put on and the ``rank``, its size. The
            shape of a matrix is ``(out_features, in_features)``, also of a convolution's flattened one; that of a block
            ``(width,)``.
        takes_block: whether one module is put on a whole block, in the place of the sensitive weights of all its
            matrices, instead of on one matrix.
    """

    cost: Callable[[tuple[int, ...], int], int]
    takes_block: bool = False


def _lora_cost(shape: tuple[int, ...], rank: int) -> int:
    return rank * sum(shape)


def _adapter_cost(shape: tuple[int, ...], rank: int) -> int:
    out_features = shape[0]
    return 2 * rank * out_features + rank + out_features


# LoRA: r (in + out), see SPT, section 3.3: a module never costs more than the sensitive weights it replaces. Adapter:
# both projections of the matrix's output and their biases, as in SPT's published code. Prompts: r tokens.
KINDS: dict[str, StructuredKind] = {
    "lora": StructuredKind(_lora_cost),
    "adapter": StructuredKind(_adapter_cost),
    "prompt": StructuredKind(lambda shape, rank: rank * prod(shape), takes_block=True),
}


def find_kind(name: str) -> StructuredKind:
    """The kind of that name.

    Raises:
        UserError: there is none; a kind of one's own has to be registered before.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(
            f"structured={name!r}: no such kind of module; choose one of {', '.join(KINDS)}, or import the file that "
            "registers it first (custom_imports in a config, --import of launch/report.py)"
        )
    return KINDS[name]


def structured_cost(kind: str, shape: tuple[int, ...], rank: int) -> int:
    """Trainable parameters of a module of ``kind`` and size ``rank`` on what has ``shape``, see ``StructuredKind``.

    Args:
        kind: name of the kind.
        shape: of a matrix, of a convolution's weight ``(out, in / groups, height, width)``, or of a block.
        rank: size of the module.

    Raises:
        UserError: there is no such kind, or its cost is no whole number.
    """
    flat = (shape[0], prod(shape[1:])) if len(shape) > 1 else shape
    cost = find_kind(kind).cost(flat, rank)
    if not isinstance(cost, int) or cost < 1:
        raise UserError(f"structured={kind!r}: its cost has to be a whole number of parameters, not {cost!r}")
    return cost


@dataclass(frozen=True)
class ModuleOptions:
    """How structured modules are set up.

    Attributes:
        init: "zero": updates start at zero (LoRA, section 4.1; prompts, which have no such start, as in VPT). "normal":
            all matrices and prompts are drawn from N(0, 0.02), cut off at two; biases start at zero.
        dropout: on what a module reads (of prompts on themselves), in training.
        drop_path: share of samples for which a module is left out, in training; samples are what the first axis of the
            layer's input counts, windows in Swin. Prompts are never left out.
        parallel: layers, by the last part of their name in the model ("proj"), whose modules read the layer's input,
            without dropout, also if those of their kind read its output elsewhere.
    """

    init: str = "zero"
    dropout: float = 0.0
    drop_path: float = 0.0
    parallel: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parallel", tuple(self.parallel))
        if self.init not in INITS:
            raise UserError(f"init={self.init!r}: choose one of {', '.join(INITS)}")
        for name, value in (("dropout", self.dropout), ("drop_path", self.drop_path)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(f"{name}={value!r}: has to be a number from 0 to below 1")


@dataclass(frozen=True)
class Preset:
    """A named choice of ``alpha`` and ``beta`` (see ``costs.AllocationRule``) and of the modules' set-up."""

    alpha: float
    beta: float | None
    modules: ModuleOptions


# The published code adds the modules before it initialises the model, so that its zeros are overwritten. Its adapters
# come behind the layers, but beside the attention's output projection.
RELEASED_MODULES = ModuleOptions(init="normal", dropout=0.1, drop_path=0.1, parallel=("proj",))
PRESETS = {
    "paper": Preset(alpha=1.0, beta=None, modules=ModuleOptions()),
    "released": Preset(alpha=10.0, beta=5.0, modules=RELEASED_MODULES),
}
