"""What the user asks of an allocation, checked without any scores."""

from dataclasses import dataclass
from numbers import Integral, Real

from spt_dist.allocation.costs import AllocationRule
from spt_dist.allocation.kinds import PRESETS, ModuleOptions, Preset
from spt_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AllocationRequest:
    """The arguments of ``allocate``, with its defaults; see there."""

    budget: int | float | None = None
    tau: int | None = None
    structured: str | None = "lora"
    unstructured: bool = True
    rank: int = 8
    alpha: float = 1.0
    beta: float | None = None
    init: str = "zero"
    dropout: float = 0.0
    drop_path: float = 0.0
    preset: str | None = None

    def resolve(self, backbone_size: int, reserved: int) -> tuple[AllocationRule, int | None]:
        """Turn the request into a rule and a limit, so that a mistake is found before the scoring pass.

        Args:
            backbone_size: weights of the backbone, head not counted.
            reserved: parameters that are trained whatever the scores (``cls_token``).

        Returns:
            The rule, and the budget as a number of parameters (``None`` if ``tau`` is given).

        Raises:
            UserError: as ``allocate``.
        """
        wanted = self._settings()
        for name, value in (("tau", self.tau), ("rank", self.rank)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise UserError(f"{name}={value!r}: has to be a whole number")
        if (self.budget is None) == (self.tau is None):
            raise UserError("give either budget (trainable parameters) or tau (sensitive weights)")
        rule = AllocationRule(self.structured, self.unstructured, self.rank, wanted.alpha, wanted.beta)
        return rule, None if self.budget is None else resolve_budget(self.budget, backbone_size, reserved)

    def module_options(self) -> ModuleOptions:
        """How the structured modules are set up.

        Raises:
            UserError: as ``allocate``.
        """
        return self._settings().modules

    def _settings(self) -> Preset:
        if self.preset is None:
            return Preset(self.alpha, self.beta, ModuleOptions(self.init, self.dropout, self.drop_path))
        if self.preset not in PRESETS:
            raise UserError(f"preset={self.preset!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[self.preset]


def resolve_budget(budget: int | float, backbone_size: int, reserved: int) -> int:
    """A budget as a number of parameters.

    Args:
        budget: a count, or a fraction of the backbone if it is a float up to 1.
        backbone_size: weights of the backbone, head not counted.
        reserved: parameters that are trained whatever the scores (``cls_token``).

    Raises:
        UserError: not a number; below ``reserved`` and one weight; above the backbone.
    """
    if isinstance(budget, bool) or not isinstance(budget, Real) or budget != budget:
        raise UserError(f"budget={budget!r}: give a number of parameters or a fraction of the backbone")
    # Compared before rounding: infinity can't be rounded.
    if budget > backbone_size:
        raise UserError(f"budget={budget}: above the backbone's {backbone_size:,} weights; use full fine-tuning then")
    is_fraction = not isinstance(budget, Integral) and budget <= 1
    if not is_fraction and budget != int(budget):
        raise UserError(f"budget={budget}: a fraction lies between 0 and 1, a count is a whole number")
    limit = int(budget * backbone_size) if is_fraction else int(budget)
    if limit < reserved + 1:
        token = f"cls_token's {reserved} parameters, which are always tuned, and one weight"
        raise UserError(
            f"budget={budget}: {limit} parameters are not enough for {token if reserved else 'one weight'}; "
            f"give at least {reserved + 1}"
        )
    return limit
