"""Additions to entries of a parameter, for every way of reading it."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from spt_dist import Plan, inject, merge, trainable_parameters
from spt_dist.models.layers import layer_kind
from spt_dist.tuning.entries import EntryDelta, merge_entries, tune_entries
from tests.tuning.plans_for_tests import MODELS, disturb, make_images, make_model, random_plan


@given(st.lists(st.integers(1, 4), max_size=4), st.booleans(), st.data())
def test_entries_are_counted_row_by_row(shape: list[int], transposed: bool, data: st.DataObject) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    tensor = tensor.mT if transposed and tensor.ndim > 1 else tensor
    size = tensor.numel()
    chosen = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    delta = EntryDelta(torch.tensor(chosen))
    assert torch.equal(delta(tensor), tensor)
    delta.values.data = torch.arange(1.0, len(chosen) + 1)
    wanted = tensor.flatten().tolist()
    for place, position in enumerate(chosen):
        wanted[position] += place + 1
    assert delta(tensor).flatten().tolist() == wanted
    assert delta(tensor).shape == tensor.shape


class Readers(nn.Module):
    """Reads its parameters by every road but its own forward's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))
        self.others = nn.ParameterList([torch.rand(3), torch.rand(3)])
        self.convolution = nn.Conv1d(1, 1, 3)
        self.norm = nn.GroupNorm(1, 3)

    def features(self, x: Tensor) -> Tensor:
        """Not ``forward``, so that no hook of the module sees it."""
        kernel = getattr(self.convolution, "weight").flatten()  # noqa: B009
        return (x * self.scale + sum(self.others)) * kernel + self.convolution.bias + self.norm.weight


def test_every_reader_gets_the_sum() -> None:
    torch.manual_seed(0)
    model, plain = Readers(), Readers()
    x = torch.rand(2, 3)
    names = [name for name, _ in model.named_parameters() if name != "norm.bias"]
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    before = model.features(x)
    tuned = inject(model, Plan(vectors=names, shapes=shapes))
    assert torch.equal(tuned.features(x), before)
    disturb(tuned)
    for name, parameter in plain.named_parameters():
        parameter.data = parameter_with_delta(tuned, name)
    assert torch.equal(tuned.features(x), plain.features(x))
    tuned.features(x).sum().backward()
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(tuned))
    merged = merge(tuned)
    assert torch.equal(merged.features(x), plain.features(x))
    assert type(merged) is Readers


def parameter_with_delta(model: nn.Module, name: str) -> Tensor:
    """The sum, from the two parts' own values."""
    parameters = dict(model.named_parameters())
    changed = parameters[name].detach().clone()
    if f"{name}_delta.values" in parameters:
        changed += parameters[f"{name}_delta.values"].detach().view_as(changed)
    return changed


def test_one_module_of_a_class_is_tuned_and_given_back() -> None:
    tuned, other = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
    names = [name for name, _ in tuned.named_parameters()]
    weight, image = tuned.weight.detach().clone(), torch.rand(1, 2, 4, 4)
    tune_entries(tuned, "weight", EntryDelta(torch.tensor([5])))
    tune_entries(tuned, "bias", EntryDelta(torch.tensor([0])))
    assert isinstance(tuned, nn.Conv2d)
    assert layer_kind(tuned) == "conv2d"
    assert type(tuned).__name__ == "Conv2d"
    assert type(other) is nn.Conv2d
    tuned.get_parameter("weight_delta.values").data += 1
    changed = weight.flatten()
    changed[5] += 1
    assert torch.equal(tuned(image), F.conv2d(image, changed.view_as(weight), tuned.bias))
    merge_entries(tuned)
    assert type(tuned) is nn.Conv2d
    assert [name for name, _ in tuned.named_parameters()] == names
    assert torch.equal(tuned.weight, changed.view_as(weight))


@pytest.mark.parametrize("kind", MODELS)
def test_tuned_and_merged_models_are_copied_and_pickled(kind: str) -> None:
    model, (images, _) = make_model(kind), make_images(kind)
    tuned = inject(model, random_plan(model, 2))
    disturb(tuned)
    outputs = tuned(images)
    for again in (pickle.loads(pickle.dumps(tuned)), copy.deepcopy(tuned)):
        assert torch.equal(again(images), outputs)
        disturb(again, seed=2)
        assert not torch.equal(again(images), outputs)
        assert torch.equal(tuned(images), outputs), "the copy has to have values of its own"
        assert not torch.equal(merge(again)(images), outputs)
    merged = merge(tuned)
    assert torch.equal(pickle.loads(pickle.dumps(merged))(images), merged(images))
