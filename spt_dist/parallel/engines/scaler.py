"""The state of torch's GradScaler as tensors."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_PREFIX = "scaler/"
_KEYS = ("scale", "_growth_tracker")


def read_scaler(scaler: Any) -> Iterator[tuple[str, Tensor]]:
    """``scaler/...`` and a value each; nothing for a scaler that is switched off."""
    state = scaler.state_dict()
    for key in _KEYS:
        if key in state:
            yield _PREFIX + key, torch.tensor(float(state[key]))


def write_scaler(scaler: Any, state: Mapping[str, Tensor]) -> None:
    """Take over what ``read_scaler`` gave, if there is any and the scaler is on."""
    if scaler.is_enabled() and _PREFIX + "scale" in state:
        values = {key: float(state[_PREFIX + key]) for key in _KEYS}
        scaler.load_state_dict(scaler.state_dict() | values | {"_growth_tracker": int(values["_growth_tracker"])})
