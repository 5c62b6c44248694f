"""When a tensor is tuned by a module, whole or weight by weight, and what that costs in trainable parameters."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Real

from spt_dist.allocation.kinds import find_kind, structured_cost
from spt_dist.errors import UserError

# A block's name ends with the last number: blocks.3 of blocks.3.attn.q.weight.
_BLOCK = re.compile(r"(.*\.\d+)\.[^\d].*")


@dataclass(frozen=True)
class AllocationRule:
    """How the user wants sensitive weights to be tuned.

    Attributes:
        structured: kind of the structured module, or ``None`` for none.
        unstructured: whether weights may be tuned one by one.
        rank: size of the structured modules.
        alpha: a module is put in the place of ``c`` sensitive weights if ``c >= cost / alpha``. 1 is the paper's
            promise (never dearer than what it replaces), 10 is the published code's value.
        beta: a vector of length ``n`` is tuned whole if ``c >= n / beta``; ``None`` for never.
    """

    structured: str | None
    unstructured: bool
    rank: int
    alpha: float
    beta: float | None

    def __post_init__(self) -> None:
        if self.structured is not None:
            find_kind(self.structured)
        if not isinstance(self.unstructured, bool):
            raise UserError(f"unstructured={self.unstructured!r}: has to be True or False")
        if self.structured is None and not self.unstructured and self.beta is None:
            raise UserError("structured=None with unstructured=False leaves nothing to tune; switch one of them on")
        if self.rank < 1:
            raise UserError(f"rank={self.rank}: has to be at least 1")
        # Below 1 a matrix could get cheaper as more of its weights become sensitive, and no budget could be solved.
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None and not (isinstance(value, Real) and value >= 1):
                raise UserError(f"{name}={value!r}: has to be a number of at least 1")


@dataclass(frozen=True)
class Unit:
    """What one structured module is put on.

    Attributes:
        name: of the matrix, or of the block.
        shape: of the matrix's parameter, or ``(width,)`` of the block.
        members: places, among all tensors, of the matrices whose sensitive weights it stands for.
        cost: its trainable parameters.
    """

    name: str
    shape: tuple[int, ...]
    members: tuple[int, ...]
    cost: int


@dataclass(frozen=True)
class Choice:
    """How every tensor is tuned; those not named are frozen.

    Attributes:
        units: what gets a structured module.
        vectors: names of vectors that are tuned whole.
        sparse: names of tensors some of whose weights are tuned one by one.
        cost: trainable parameters of all that.
    """

    units: list[Unit]
    vectors: list[str]
    sparse: list[str]
    cost: int


def block_of(name: str) -> str | None:
    """Name of the block that the parameter ``name`` is in, ``None`` for one outside the blocks."""
    found = _BLOCK.fullmatch(name)
    return None if found is None else found[1]


class Chooser:
    """Decides for all tensors from their numbers of sensitive weights; never cheaper in total for more of them."""

    def __init__(
        self,
        rule: AllocationRule,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        matrices: Collection[str],
    ) -> None:
        """Take note of what is to be decided on.

        Args:
            rule: how.
            names, shapes: of the tensors.
            matrices: names of those that can take a structured module.

        Raises:
            UserError: the rule's modules are put on blocks, and a block has convolutions.
        """
        self.rule, self.names, self.shapes = rule, names, shapes
        self.units = _make_units(rule, names, shapes, set(matrices))

    def choose(self, counts: Sequence[int]) -> Choice:
        """Decide, given each tensor's number of sensitive weights."""
        rule = self.rule
        chosen = [unit for unit in self.units if self._wants_module(unit, counts)]
        replaced = {place for unit in chosen for place in unit.members}
        vectors, sparse = [], []
        cost = sum(unit.cost for unit in chosen)
        for place, (name, shape, count) in enumerate(zip(self.names, self.shapes, counts, strict=True)):
            if count == 0 or place in replaced:
                continue
            if len(shape) == 1 and rule.beta is not None and count >= prod(shape) / rule.beta:
                vectors.append(name)
                cost += prod(shape)
            elif rule.unstructured:
                sparse.append(name)
                cost += count
        return Choice(chosen, vectors, sparse, cost)

    def _wants_module(self, unit: Unit, counts: Sequence[int]) -> bool:
        count = sum(counts[place] for place in unit.members)
        return count > 0 and count >= unit.cost / self.rule.alpha


def _make_units(
    rule: AllocationRule, names: Sequence[str], shapes: Sequence[tuple[int, ...]], matrices: set[str]
) -> list[Unit]:
    """What modules of the rule's kind can be put on: each matrix, or each block that has matrices."""
    if rule.structured is None:
        return []
    takes_block = find_kind(rule.structured).takes_block
    members: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        unit = block_of(name) if takes_block else name
        if name in matrices and unit is not None:
            members.setdefault(unit, []).append(place)
    units = []
    for name, places in members.items():
        shape = shapes[places[0]]
        if takes_block:
            if any(len(shapes[place]) > 2 for place in places):
                raise UserError(
                    f"structured={rule.structured!r}: {name} works with convolutions, so there are no tokens to add "
                    'any to; choose "lora" or "adapter"'
                )
            # A block's first matrix reads the tokens, so its in_features are the block's width.
            shape = shape[-1:]
        units.append(Unit(name, shape, tuple(places), structured_cost(rule.structured, shape, rule.rank)))
    return units
