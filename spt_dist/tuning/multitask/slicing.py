"""Which modules of a model can be run on some samples of a batch alone.

Leading axes do not tell: a table of relative positions may have as many rows as the batch has samples, and windows may
be sorted in any way. So the model is asked: it is run on one sample, on another one, and on both, and what every module
is given and returns is compared. This also holds for models that nobody here has thought of.

Shape suffixes: L leading axis, E a few entries of each of its places.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.models.matrices import find_heads, parent_of

# Entries compared of each place of a leading axis.
_NUM_ENTRIES = 16
# What rounding may make of a value, in another batch: parts of the value itself, and of the spread over samples.
_ROUNDING = 1e-4
_SHARE_OF_SPREAD = 0.1
# For every module its calls, for every call its arguments and its output, see `_sketch`.
_Calls = dict[str, list[list[Any]]]


@dataclass(frozen=True)
class Slicing:
    """How a model can be run with other modules for some samples of a batch.

    Attributes:
        arguments: name of a module that can be run on some samples alone -> for each of its arguments, positional ones
            first, whether its leading axis goes through the samples in their order, with equally many places for each.
            Empty where only the whole model can be run on some samples alone.
        behind_trunk: modules that run in ``forward_head`` only.
    """

    arguments: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    behind_trunk: frozenset[str] = frozenset()

    def point_for(self, name: str) -> str | None:
        """The module to be run on some samples alone so that ``name`` is: itself, or the nearest one around it.

        Returns:
            "" for the whole model; ``None`` if there is none in the trunk, since ``name`` belongs to the head.
        """
        while name and name not in self.arguments:
            if name in self.behind_trunk:
                return None
            name = parent_of(name)
        return name


def has_stages(model: nn.Module) -> bool:
    """Whether the model has timm's two stages, ``forward_features`` and ``forward_head``."""
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head"))


def run_trunk(model: nn.Module, images: Tensor) -> Tensor:
    """The model but for its head: timm's ``forward_features``; all of a model that has no stages."""
    stage: Any = model.forward_features if has_stages(model) else model
    features: Tensor = stage(images)
    return features


def run_head(model: nn.Module, features: Tensor) -> Tensor:
    """What is left after ``run_trunk``."""
    stage: Any = model.forward_head if has_stages(model) else nn.Identity()
    logits: Tensor = stage(features)
    return logits


@torch.no_grad()
def find_slicing(model: nn.Module, images: Tensor) -> Slicing:
    """Run a plain model on two random images like ``images``, six in all, to see what goes through the samples.

    The root's own parameters of leading axis 1 (``cls_token``, ``pos_embed``) take part with one value a sample: they
    have to work so as well, or the result is that only the whole model can be run on some samples alone.
    """
    if find_heads(model) and not has_stages(model):
        return Slicing()
    generator = torch.Generator().manual_seed(0)
    like = next(model.parameters())
    both = torch.randn(2, *images.shape[1:], generator=generator).to(images.device, like.dtype)
    tokens = {name: value for name, value in model.named_parameters(recurse=False) if is_stackable(value)}
    others = {name: value + torch.randn(value.shape, generator=generator).to(value) for name, value in tokens.items()}
    stacked = {name: torch.cat([value, others[name]]) for name, value in tokens.items()}
    try:
        # Under autocast, rounding would hide what is looked for.
        with torch.autocast(images.device.type, enabled=False):
            first_calls, first = _record(model, tokens, partial(run_trunk, model, both[:1]))
            second_calls, second = _record(model, others, partial(run_trunk, model, both[1:]))
            calls, features = _record(model, stacked, partial(run_trunk, model, both))
            all_calls, logits = _record(model, stacked, partial(model, both))
            first_logits, second_logits = (run_head(model, part) for part in features.split(1))
    except Exception:  # whatever a model makes of one token a sample: each task alone will do for any model
        return Slicing()
    whole = ((first, second, features), (first_logits, second_logits, logits))
    if not all(_goes_through_samples(*run) for run in whole):
        return Slicing()
    runs = (first_calls, second_calls, calls)
    found = {name: _find_arguments(*(run.get(name, []) for run in runs)) for name in calls}
    arguments = {name: flags for name, flags in found.items() if flags is not None}
    return Slicing(arguments, frozenset(all_calls.keys() - calls.keys()))


def is_stackable(value: Tensor) -> bool:
    """Whether a parameter may have one value a sample along its leading axis, as tokens do."""
    return value.dim() > 1 and len(value) == 1


@contextmanager
def overridden(attributes: Iterable[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Let ``module.<name>`` be ``value`` for each ``(module, name, value)``, whoever reads it, until the block ends.

    A module's own ``__dict__`` comes before its class and its parameters, which stay as they are.
    """
    before = []
    try:
        for module, name, value in attributes:
            before.append((module.__dict__, name, {name: module.__dict__[name]} if name in module.__dict__ else {}))
            module.__dict__[name] = value
        yield
    finally:
        for content, name, previous in reversed(before):
            del content[name]
            content.update(previous)


def _record(model: nn.Module, tokens: Mapping[str, Tensor], run: Callable[[], Tensor]) -> tuple[_Calls, Tensor]:
    """What all modules but the root are given and return in ``run``, with ``tokens`` for the root's parameters."""
    calls: _Calls = defaultdict(list)

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name].append([_sketch(value) for value in (*args, *kwargs.values(), output)])

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(partial(note, name), with_kwargs=True) for name, module in named]
    try:
        with overridden((model, name, value) for name, value in tokens.items()):
            return calls, run()
    finally:
        for handle in handles:
            handle.remove()


def _sketch(value: Any) -> Any:
    """A tensor's sketch ``(L, E)``; plain values as they are; something that equals nothing else for all others."""
    if isinstance(value, Tensor) and value.dim() and value.numel():
        flat = value.detach().flatten(1) if value.dim() > 1 else value.detach().unsqueeze(1)
        places = torch.linspace(0, flat.shape[1] - 1, _NUM_ENTRIES, device=flat.device).long()
        return torch.nan_to_num(flat[:, places].float(), nan=0.0, posinf=1.0, neginf=-1.0)
    return value if _is_plain(value) else object()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _find_arguments(first: list[Any], second: list[Any], both: list[Any]) -> tuple[bool, ...] | None:
    """Which arguments of a module go through the samples, from its calls; ``None`` if it needs all samples at once."""
    if not len(first) == len(second) == len(both):
        return None
    found = set()
    for call in zip(first, second, both, strict=True):
        *arguments, output = [_find_role(*value) for value in zip(*call, strict=True)]
        if not output or True not in arguments or None in arguments:
            return None
        found.add(tuple(bool(role) for role in arguments))
    return found.pop() if len(found) == 1 else None


def _find_role(first: Any, second: Any, both: Any) -> bool | None:
    """``True`` for what goes through the samples, ``False`` for what is the same whatever they are, else ``None``."""
    if not isinstance(first, Tensor):
        return False if first == second == both else None
    if first.shape == second.shape == both.shape:
        is_same = max(_rms(first - second), _rms(first - both)) <= _ROUNDING * _rms(first)
        return False if is_same else None
    return True if _goes_through_samples(first, second, both) else None


def _goes_through_samples(first_LE: Tensor, second_LE: Tensor, both_LE: Tensor) -> bool:
    """Whether the tensor for both samples is those for each, one behind the other."""
    if len(both_LE) != 2 * len(first_LE) or first_LE.shape != second_LE.shape:
        return False
    expected_LE = torch.cat([first_LE, second_LE])
    # Two places must not be taken for each other because they differ little for any sample.
    limit = _SHARE_OF_SPREAD * _rms(first_LE - second_LE) + _ROUNDING * _rms(expected_LE)
    return _rms(both_LE - expected_LE) <= limit


def _rms(values: Tensor) -> float:
    return values.float().square().mean().sqrt().item()
