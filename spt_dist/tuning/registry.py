"""Which class makes the structured modules of which kind, and how to add a kind of one's own.

A kind of one's own is a class and a decorator::

    @register_structured("scale", cost=lambda shape, rank: shape[0])
    class Scale(StructuredModule):
        reads_output = True

        def __init__(self, spec: ModuleSpec) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.zeros(spec.out_features, device=spec.device))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * self.factor

``allocate(scores, budget=..., structured="scale")`` and every function after it then know it.
"""

from collections.abc import Callable

from spt_dist.allocation.kinds import KINDS, StructuredKind, structured_cost
from spt_dist.errors import UserError
from spt_dist.tuning.adapter import Adapter
from spt_dist.tuning.lora import LowRank
from spt_dist.tuning.structured import ModuleSpec, StructuredModule

# Kinds on matrices; `allocation.kinds.KINDS` has their costs.
MODULES: dict[str, type[StructuredModule]] = {"lora": LowRank, "adapter": Adapter}


def register_structured(
    name: str, cost: Callable[[tuple[int, ...], int], int]
) -> Callable[[type[StructuredModule]], type[StructuredModule]]:
    """Make a class of structured modules known under ``name``; a decorator.

    Args:
        name: for ``structured=`` in ``allocate`` and in configs, and in plans and task files.
        cost: trainable parameters of one module from the matrix's shape ``(out_features, in_features)`` and the rank;
            has to be what the module has.

    Raises:
        UserError: the name is taken, or the class is no ``StructuredModule``.
    """

    def register(cls: type[StructuredModule]) -> type[StructuredModule]:
        # The same class may come again: a notebook's cell is run twice.
        if name in KINDS and not _is_same_class(MODULES.get(name), cls):
            raise UserError(f"register_structured: the name {name!r} is taken; choose another one")
        if not issubclass(cls, StructuredModule):
            raise UserError(f"register_structured: {cls.__name__} has to be a subclass of StructuredModule")
        KINDS[name] = StructuredKind(cost)
        MODULES[name] = cls
        return cls

    return register


def is_mergeable(kind: str) -> bool:
    """Whether a weight can hold what modules of ``kind`` do."""
    return kind in MODULES and MODULES[kind].can_merge()


def make_module(kind: str, spec: ModuleSpec) -> StructuredModule:
    """A module of ``kind``; its parameters are those that its cost says.

    Raises:
        UserError: its class has another number of parameters, or buffers that task files would have to hold.
    """
    module = MODULES[kind](spec)
    wanted = structured_cost(kind, (spec.out_features, spec.in_features), spec.rank)
    found = sum(parameter.numel() for parameter in module.parameters())
    if found != wanted:
        raise UserError(
            f"structured={kind!r}: a {type(module).__name__} for {spec.out_features} x {spec.in_features} weights has "
            f"{found:,} parameters, but its cost was registered as {wanted:,}; make them agree"
        )
    buffers = module.state_dict().keys() - dict(module.named_parameters()).keys()
    if buffers:
        raise UserError(
            f"structured={kind!r}: a {type(module).__name__} keeps buffers ({min(buffers)}), which task files don't "
            "hold; make them parameters, or not persistent and the same for every module of equal spec"
        )
    return module


def _is_same_class(one: type | None, other: type) -> bool:
    return one is not None and (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
