"""How grey levels are shifted and scaled before a backbone sees them, by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from spt_dist.errors import UserError


@dataclass(frozen=True)
class Normalisation:
    """``(grey - mean) / std``, for red, green and blue, where white is 1.

    Attributes:
        name: one of ``NORMALISATIONS``, or "own values".
        mean, std: of red, green and blue.
        source: the config's key that asks for it, with its value where that is not the name; "" for none.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str = ""

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{self.name}, mean {mean}, deviation {std}" + (f" ({self.source})" if self.source else "")


NORMALISATIONS: Final[dict[str, Normalisation]] = {
    found.name: found
    for found in (
        Normalisation("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        Normalisation("inception", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        Normalisation("clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        Normalisation("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )
}


def read_normalisation(key: str, value: str | Mapping[str, Any]) -> Normalisation:
    """What a config says about it.

    Args:
        key: of the config, for errors and as the ``source``.
        value: one of ``NORMALISATIONS``, or ``{"mean": [...], "std": [...]}`` with three numbers each.

    Raises:
        UserError: an unknown name or key; not three numbers; a deviation that is not above 0.
    """
    if isinstance(value, str):
        if value not in NORMALISATIONS:
            known = ", ".join(map(repr, NORMALISATIONS))
            raise UserError(f"config: {key}={value!r} is unknown; known: {known}, or dict(mean=[...], std=[...])")
        return replace(NORMALISATIONS[value], source=key)
    if not isinstance(value, Mapping) or set(value) != {"mean", "std"}:
        raise UserError(f"config: {key}={value!r} has to be a name, or a dict of exactly mean and std")
    for name in ("mean", "std"):
        numbers = value[name]
        if not isinstance(numbers, list | tuple) or len(numbers) != 3 or not all(map(_is_number, numbers)):
            raise UserError(f"config: {key}.{name}={numbers!r} has to be three numbers: of red, green and blue")
    # Means above 1 are of grey levels up to 255, which other libraries' configs have.
    if not all(0 <= mean <= 1 for mean in value["mean"]) or not all(0 < std <= 1 for std in value["std"]):
        raise UserError(f"config: {key}={value!r}: white is 1 here; divide by 255 (a deviation is above 0)")
    return Normalisation("own values", tuple(map(float, value["mean"])), tuple(map(float, value["std"])), key)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
