"""What tuning a matrix, a vector or single weights costs in trainable parameters, and when each is chosen."""

from dataclasses import dataclass
from math import prod

from spt_dist.errors import UserError

# Those that can be allocated and injected; published allocations have adapters as well.
STRUCTURED_KINDS = ("lora",)
PRESETS: dict[str, tuple[float, float | None]] = {"paper": (1.0, None), "released": (10.0, 5.0)}


def structured_cost(kind: str, shape: tuple[int, ...], rank: int) -> int:
    """Trainable parameters of a structured module on a matrix of ``shape`` ``(out_features, in_features)``.

    LoRA: ``r (in + out)`` (SPT, section 3.3: "structured never costs more than the sensitive weights"). Adapter:
    ``2 r out + r + out``, both projections of the matrix's output and their biases (the published code of SPT).
    """
    out_features, in_features = shape
    if kind == "adapter":
        return 2 * rank * out_features + rank + out_features
    assert kind == "lora"
    return rank * (in_features + out_features)


@dataclass(frozen=True)
class Choice:
    """How one tensor is tuned ("structured", "vector", "sparse" or "frozen") and what that costs."""

    how: str
    cost: int


@dataclass(frozen=True)
class AllocationRule:
    """Decides for one tensor from its shape and its number of sensitive weights.

    Attributes:
        structured: kind of the structured module, or ``None`` for none.
        unstructured: whether weights may be tuned one by one.
        rank: rank of the structured module.
        alpha: a matrix with ``c`` sensitive weights becomes structured if ``c >= cost / alpha``. 1 is the paper's
            promise (never dearer than what it replaces), 10 is the published code's value.
        beta: a vector of length ``n`` is tuned whole if ``c >= n / beta``; ``None`` for never.
    """

    structured: str | None
    unstructured: bool
    rank: int
    alpha: float
    beta: float | None

    def __post_init__(self) -> None:
        if self.structured is not None and self.structured not in STRUCTURED_KINDS:
            raise UserError(
                f"structured={self.structured!r}: choose one of {', '.join(STRUCTURED_KINDS)} or None "
                "(adapters and prompts are not available yet)"
            )
        if self.structured is None and not self.unstructured:
            raise UserError("structured=None with unstructured=False leaves nothing to tune; switch one of them on")
        if self.rank < 1:
            raise UserError(f"rank={self.rank}: has to be at least 1")
        # Below 1 a matrix could get cheaper as more of its weights become sensitive, and no budget could be solved.
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None and not value >= 1:
                raise UserError(f"{name}={value}: has to be at least 1")

    def choose(self, shape: tuple[int, ...], is_matrix: bool, count: int) -> Choice:
        """Decide for a tensor of ``shape`` of which ``count`` weights are sensitive; never cheaper for more.

        Args:
            shape: of the tensor.
            is_matrix: whether it can take a structured module.
            count: its sensitive weights.
        """
        if count == 0:
            return Choice("frozen", 0)
        if is_matrix and self.structured is not None:
            cost = structured_cost(self.structured, shape, self.rank)
            if count >= cost / self.alpha:
                return Choice("structured", cost)
        if len(shape) == 1 and self.beta is not None and count >= prod(shape) / self.beta:
            return Choice("vector", prod(shape))
        return Choice("sparse", count) if self.unstructured else Choice("frozen", 0)
