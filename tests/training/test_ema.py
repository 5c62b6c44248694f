"""The moving average of a segmentation model: its parameters, and the running means of its head."""

import torch

import spt_dist
from spt_dist.models.matrices import head_buffers
from spt_dist.training.ema import MovingAverage
from spt_dist.tuning.methods import make_plan
from tests.segmentors_for_tests import make_segmentor


def test_parameters_and_running_means_are_averaged_and_put_back() -> None:
    model = make_segmentor()
    spt_dist.inject(model, make_plan("lora", model, rank=2))
    average = MovingAverage(model, 0.75)
    live = dict(spt_dist.trainable_parameters(model)) | head_buffers(model)
    expected = {name: value.detach().double() for name, value in live.items()}
    assert any(name.endswith("running_var") for name in expected)
    for step in range(3):
        with torch.no_grad():
            for name, value in live.items():
                generator = torch.Generator().manual_seed(step + len(name))
                value += torch.randn(value.shape, generator=generator)
                expected[name] = 0.75 * expected[name] + 0.25 * value.double()
        average.update()
    after = {name: value.detach().clone() for name, value in live.items()}
    with average.in_place():
        for name, value in live.items():
            torch.testing.assert_close(value.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, after[name]) for name, value in live.items())
    assert {name for name, _ in average.whole()} == set(live)
    again = MovingAverage(model, 0.75)
    again.load(dict(average.state()))
    for (name, value), (_, other) in zip(again.whole(), average.whole(), strict=True):
        assert torch.equal(value, other), name
