"""What the scores refer to, for losses of every reduction, and outputs and targets of several kinds."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import UserError, estimate_sensitivity
from tests.sensitivity.oracle import one_by_one, relative_error, squared_gradients


def make_task() -> tuple[nn.Module, Tensor, Tensor]:
    """A model that classifies each of seven positions, and four samples, some positions of which are to be ignored."""
    torch.manual_seed(0)
    labels = torch.randint(3, (4, 7))
    labels[0, :5] = labels[1, 0] = -100
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(4, 7, 5), labels


def mean_of_pixels(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions that count."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def sum_of_pixels(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over all positions that count."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")


def check(found: Any, wanted: dict[str, Tensor]) -> None:
    """All scores agree."""
    for name in found.names:
        assert relative_error(found[name], wanted[name]) < 1e-5, name


def test_batch_criterion_takes_a_mean_as_the_loss_function_weighs_it() -> None:
    model, inputs, labels = make_task()
    batches = [(inputs[:3], labels[:3]), (inputs[3:], labels[3:])]
    found = estimate_sensitivity(model, batches, mean_of_pixels, criterion="batch")
    check(found, squared_gradients(model, batches, mean_of_pixels))
    found = estimate_sensitivity(model, batches, sum_of_pixels, criterion="batch")
    check(found, squared_gradients(model, batches, lambda o, t: sum_of_pixels(o, t) / len(o)))


def test_per_sample_criterion_takes_each_samples_own_mean() -> None:
    model, inputs, labels = make_task()
    for loss_fn in (mean_of_pixels, sum_of_pixels):
        found = estimate_sensitivity(model, [(inputs, labels)], loss_fn)
        check(found, one_by_one(model, inputs, labels, loss_fn))


class Outputs(OrderedDict[str, Tensor]):
    """A dict that shows its entries as attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


@dataclass
class Opaque:
    """Outputs that nobody can take apart."""

    logits: Tensor


class Wrapped(nn.Module):
    """A model with outputs of some kind."""

    def __init__(self, model: nn.Module, wrap: Any) -> None:
        super().__init__()
        self.model = model
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        """``(B, 7, 5)`` to logits ``(B, 7, 3)`` in a wrapping."""
        return self.wrap(self.model(x))


def test_outputs_keep_their_kind() -> None:
    model, inputs, labels = make_task()
    wrapped = Wrapped(model, lambda logits: Outputs(logits=logits))
    found = estimate_sensitivity(wrapped, [(inputs, labels)], lambda o, t: mean_of_pixels(o.logits, t))
    wanted = one_by_one(model, inputs, labels, mean_of_pixels)
    check(found, {f"model.{name}": value for name, value in wanted.items()})


@pytest.mark.parametrize("criterion", ["per_sample", "batch"])
def test_outputs_that_cannot_be_taken_apart(criterion: str) -> None:
    model, inputs, labels = make_task()
    wrapped = Wrapped(model, Opaque)
    with pytest.raises(UserError, match="there is a Opaque that is no tensor"):
        estimate_sensitivity(wrapped, [(inputs, labels)], lambda o, t: mean_of_pixels(o.logits, t), criterion)
    wrapped = Wrapped(model, lambda logits: (logits, logits.square().sum()))
    with pytest.raises(UserError, match="there is a tensor without axes"):
        estimate_sensitivity(wrapped, [(inputs, labels)], lambda o, t: mean_of_pixels(o[0], t) + o[1], criterion)


def test_targets_have_to_be_tensors() -> None:
    model, inputs, labels = make_task()
    for targets, kind in ((labels.tolist(), "int in a list"), (labels.numpy(), "ndarray that is no tensor")):
        with pytest.raises(UserError, match=f"batches: in the targets there is a {kind}"):
            estimate_sensitivity(model, [(inputs, targets)], lambda o, t: mean_of_pixels(o, torch.tensor(t)))
