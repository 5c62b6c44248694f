"""Models of other libraries with random weights, and files of them under their publishers' names."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spt_dist.models.formats import Shape, Translation, translate
from spt_dist.models.weight_files import open_weights

Rules = Mapping[str, str]


class Listed:
    """Names and shapes alone: nothing of it can be read."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> Shape:
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        raise AssertionError

    def read(self, name: str) -> Tensor:
        raise AssertionError

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        raise AssertionError


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with norms, biases and layer scales that are not at their defaults."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def images(size: int = 32) -> Tensor:
    """``(2, 3, size, size)``, float64."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Each name with the first pattern that it begins with replaced; every name has to have one."""
    found = {}
    for name, value in state.items():
        pattern, new = next((pattern, new) for pattern, new in rules.items() if re.match(pattern, name))
        found[re.sub(f"^{pattern}", new, name)] = value
    assert len(found) == len(state)
    return found


def fused(state: Mapping[str, Tensor], parts: str, whole: str) -> dict[str, Tensor]:
    """Three tensors after one another become one: ``parts`` has ``{}`` in the place of q, k and v."""
    found = dict(state)
    for name in state:
        if parts.format("q") in name:
            values = [found.pop(name.replace(parts.format("q"), parts.format(letter))) for letter in "qkv"]
            found[name.replace(parts.format("q"), whole)] = torch.cat(values)
    return found


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything in the state dict."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def load(
    model: nn.Module, path: Path, ignored: tuple[str, ...] = (), has_class_position: bool = True
) -> tuple[nn.Module, Translation]:
    """Load a file tensor by tensor; nothing may be missing or left over but the names that begin as ``ignored``.

    Args:
        model: timm's; in float64 afterwards.
        path: a file that somebody else would have written.
        ignored: of the model's names or timm's names in the file.
        has_class_position: as ``translate`` takes it.
    """
    weights = open_weights(path)
    wanted = shapes_of(model)
    translation = translate(weights, wanted, has_class_position=has_class_position)
    used = {name for source in translation.sources.values() for name in source.names} | translation.unused.keys()
    assert used == set(weights.names())
    state = {}
    for name, source in translation.sources.items():
        values = [weights.read(own_name) for own_name in source.names]
        value = source.make(*values) if source.make else values[0]
        assert tuple(value.shape) == source.shape, name
        assert (source.make is None) == (source.how == "")
        state[name] = value
    state = {name: value for name, value in state.items() if not name.startswith(ignored) or name in wanted}
    loaded = model.double().load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    assert [name for name in loaded.missing_keys if not name.startswith(ignored or ("-",))] == []
    return model.eval(), translation
