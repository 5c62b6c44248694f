"""Single weights of a matrix against dense autograd: ``W`` plus the values at their places."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spt_dist.tuning import sparse
from spt_dist.tuning.layers import TunedLinear
from spt_dist.tuning.sparse import SparseDelta
from tests.tuning.kept_for_tests import kept_storages


def make_layer(
    positions: Tensor, in_features: int, out_features: int, dtype: torch.dtype, as_block: bool | None = None
) -> TunedLinear:
    """A frozen layer with moved values at ``positions``; ``as_block`` forces one of the two ways."""
    linear = nn.Linear(in_features, out_features).to(dtype).requires_grad_(False)
    layer = TunedLinear(linear)
    layer.sparse = SparseDelta(positions, in_features)
    layer.sparse.values.data = torch.randn(len(positions))
    if dtype == torch.float64:
        layer.sparse.double()
    if as_block is not None:
        layer.sparse.as_block = as_block
    return layer


def by_dense(layer: TunedLinear, positions: Tensor, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, gradient of the values and gradient of ``x``, in float64."""
    values = layer.sparse.values.detach().double().requires_grad_()
    x = x.detach().double().requires_grad_()
    weight = layer.weight.double().flatten().index_put((positions,), values, accumulate=True).view_as(layer.weight)
    outputs = x @ weight.T + layer.bias.double()
    return outputs.detach(), *torch.autograd.grad((outputs * direction).sum(), (values, x))


def check(layer: TunedLinear, positions: Tensor, x: Tensor, tolerance: float) -> None:
    """Outputs and gradients of a layer, with errors measured against the largest of each."""
    outputs = layer(x)
    direction = torch.randn(outputs.shape, dtype=torch.float64)
    (outputs.double() * direction).sum().backward()
    wanted = by_dense(layer, positions, x, direction)
    found = (outputs.detach(), layer.sparse.values.grad, x.grad)
    for what, mine, right in zip(("outputs", "values", "x"), found, wanted, strict=True):
        if what == "x" and not x.requires_grad:
            continue
        assert mine.shape == right.shape
        assert (mine.double() - right).abs().amax() <= tolerance * right.abs().amax().clamp(min=1), what
    assert layer.weight.grad is None
    assert layer.bias.grad is None


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, list[int], Tensor]:
    """``in_features``, ``out_features``, leading axes, and chosen places of every kind."""
    columns, rows = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    axes = draw(st.lists(st.integers(1, 4), max_size=3))
    place = draw(st.integers(0, rows * columns - 1))
    row, column = divmod(place, columns)
    chosen = draw(
        st.sampled_from(
            [
                [place],
                [*range(rows * columns)],
                [*range(row * columns, (row + 1) * columns)],
                [*range(column, rows * columns, columns)],
            ]
        )
        | st.sets(st.integers(0, rows * columns - 1), min_size=1).map(sorted)
    )
    return columns, rows, axes, torch.tensor(chosen)


@pytest.mark.parametrize("as_block", [True, False], ids=["block", "one by one"])
@settings(max_examples=120, deadline=None)
@given(problem=problems(), dtype=st.sampled_from([torch.float32, torch.float64]), needs=st.booleans(), data=st.data())
def test_both_ways_equal_a_dense_weight(
    as_block: bool, problem: tuple[int, int, list[int], Tensor], dtype: torch.dtype, needs: bool, data: st.DataObject
) -> None:
    columns, rows, axes, positions = problem
    layer = make_layer(positions, columns, rows, dtype, as_block)
    x = torch.randn(*axes, columns, dtype=dtype)
    if axes and data.draw(st.booleans(), "not contiguous"):
        x = torch.randn(columns, *axes, dtype=dtype).movedim(0, -1)
    check(layer, positions, x.requires_grad_(needs), 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("as_block", [True, False])
@pytest.mark.parametrize("axes", [(0,), (0, 5), (3, 0)])
def test_batches_may_be_empty(axes: tuple[int, ...], as_block: bool) -> None:
    layer = make_layer(torch.tensor([1, 7, 9]), 4, 3, torch.float32, as_block)
    x = torch.randn(*axes, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (*axes, 4)
    assert torch.equal(layer.sparse.values.grad, torch.zeros(3))


STREWN = torch.arange(0, 48 * 32, 37)


@pytest.mark.parametrize("as_block", [True, False])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast(as_block: bool, input_dtype: torch.dtype) -> None:
    layer = make_layer(STREWN, 32, 48, torch.float32, as_block)
    x = torch.randn(4, 6, 32).to(input_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        check(layer, STREWN, x, 0.03)
        assert layer(x).dtype == torch.bfloat16
    assert layer.sparse.values.grad.dtype == torch.float32
    assert x.grad.dtype == input_dtype


@pytest.mark.parametrize("as_block", [True, False])
def test_bfloat16_layers(as_block: bool) -> None:
    layer = make_layer(STREWN, 32, 48, torch.bfloat16, as_block)
    assert layer.sparse.values.dtype == torch.float32
    check(layer, STREWN, torch.randn(4, 6, 32, dtype=torch.bfloat16).requires_grad_(), 0.03)


def test_weights_that_fill_their_block_poorly_are_multiplied_one_by_one() -> None:
    """On a diagonal, n weights span a block of n x n; an empty row or column does not count."""
    limit = sparse.BLOCK_LIMIT
    for count, as_block in ((1, True), (limit, True), (limit + 1, False), (2 * limit, False)):
        assert SparseDelta(torch.arange(count) * (5 * limit + 1), 5 * limit).as_block == as_block
    assert SparseDelta(torch.arange(5 * limit), 5 * limit).as_block
    assert SparseDelta(torch.arange(5 * limit) * 5 * limit, 5 * limit).as_block


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 41, 42])
def test_chunks_make_no_difference(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """42 weights, several of each row and column."""
    positions = torch.randperm(8 * 9, generator=torch.Generator().manual_seed(0))[:42].sort().values
    layer = make_layer(positions, 9, 8, torch.float64, as_block=False)
    x = torch.randn(3, 5, 9, dtype=torch.float64, requires_grad=True)
    found = []
    for size in (10_000, chunk_size):
        monkeypatch.setattr(sparse, "CHUNK_SIZE", size)
        outputs = layer(x)
        found.append([outputs.detach(), *torch.autograd.grad(outputs.cos().sum(), (layer.sparse.values, x))])
    for whole, in_chunks in zip(*found, strict=True):
        assert torch.allclose(whole, in_chunks, rtol=1e-12, atol=1e-12)
    check(layer, positions, x, 1e-12)


@pytest.mark.parametrize("as_block", [True, False])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_only_the_needed_columns_are_kept(as_block: bool, input_dtype: torch.dtype) -> None:
    columns, rows, tokens = 512, 300, 700
    # Eight columns, sixteen rows, of which each weight takes some.
    positions = torch.tensor(
        sorted({row * columns + 61 * ((row + k) % 8) for row in range(0, 160, 10) for k in (0, 3)})
    )
    layer = make_layer(positions, columns, rows, input_dtype, as_block)
    x = torch.randn(tokens, columns, dtype=input_dtype, requires_grad=True)

    def run() -> Tensor:
        # An intermediate tensor, which nothing but the layer would keep.
        return layer(x.clone())

    with_sparse = kept_storages(run)
    delta, layer.sparse = layer.sparse, None
    without = kept_storages(run)
    extra = sum(size for address, size in with_sparse.items() if address not in without)
    needed = tokens * 8 * x.element_size()
    indices = 8 * (8 + 16 + 3 * len(positions))
    small = 4 * (8 * 16 + 2 * len(positions))
    assert delta.rows.numel() == 16
    assert delta.columns.numel() == 8
    assert needed <= extra <= needed + indices + small
    assert extra < 0.05 * x.numel() * x.element_size()


class Allocations(TorchDispatchMode):
    """Notes the sizes of all tensors that operations make, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.sizes.append(made.numel())
        return result


@pytest.mark.parametrize("as_block", [True, False])
def test_the_frozen_weight_is_neither_copied_nor_given_a_gradient(as_block: bool) -> None:
    linear = nn.Linear(128, 96).requires_grad_(False)
    before = linear.weight.clone()
    layer = TunedLinear(linear)
    assert layer.weight is linear.weight
    layer.sparse = SparseDelta(torch.arange(0, 128 * 96, 600), 128)
    layer.sparse.as_block = as_block
    layer.sparse.values.data.normal_()
    x = torch.randn(2, 3, 128, requires_grad=True)
    with Allocations() as made:
        outputs = layer(x)
        outputs.sum().backward()
    assert max(made.sizes) <= 2 * 3 * 128, "nothing of the weight's size is made, forth or back"
    assert layer.sparse.values.grad.abs().min() > 0
    assert linear.weight.grad is None
    assert torch.equal(linear.weight, before)


@given(problems(), st.sampled_from([1, -1]))
def test_values_are_added_to_a_weight_at_their_places(problem: tuple[int, int, list[int], Tensor], sign: int) -> None:
    columns, rows, _, positions = problem
    delta = SparseDelta(positions, columns)
    delta.values.data = torch.randn(len(positions))
    weight = torch.randn(rows, columns, dtype=torch.float64)
    wanted = weight.flatten().tolist()
    for place, value in zip(positions.tolist(), delta.values.tolist(), strict=True):
        wanted[place] += sign * value
    with torch.no_grad():
        delta.add_to_weight(weight, sign)
    assert weight.flatten().tolist() == wanted


@pytest.mark.parametrize("as_block", [True, False])
def test_values_start_at_zero_and_get_gradients_at_once(as_block: bool) -> None:
    layer = TunedLinear(nn.Linear(32, 48).requires_grad_(False))
    x = torch.randn(4, 32)
    wanted = layer(x)
    layer.sparse = SparseDelta(STREWN, 32)
    layer.sparse.as_block = as_block
    assert torch.equal(layer(x), wanted)
    layer(x).sum().backward()
    assert layer.sparse.values.grad.abs().min() > 0


@pytest.mark.parametrize("as_block", [True, False])
def test_the_layers_input_is_left_alone(as_block: bool) -> None:
    layer = make_layer(STREWN, 32, 48, torch.float32, as_block)
    x = torch.randn(4, 32)
    before = x.clone()
    with torch.no_grad():
        outputs = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), outputs)
    assert torch.equal(layer(x), outputs)
    assert torch.equal(x, before)
