"""The public interface on one process and on two, with the same result."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import spt_dist
from tests.models_for_tests import make_samples, make_vit
from tests.ranks import run_ranks


def whole_job(folder: str) -> dict[str, Tensor]:
    """Score, allocate, inject, change, save, load and merge; the merged weights."""
    images, labels = make_samples(8)
    mine = slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)
    scores = spt_dist.estimate_sensitivity(make_vit(), [(images[mine], labels[mine])], F.cross_entropy)
    scores.save(f"{folder}/scores")
    plan = spt_dist.allocate(spt_dist.Scores.load(f"{folder}/scores"), budget=600, rank=2, alpha=10.0, beta=5.0)
    tuned = spt_dist.inject(make_vit(), plan)
    for place, (_, parameter) in enumerate(spt_dist.trainable_parameters(tuned)):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
    with torch.no_grad():
        for name, parameter in spt_dist.trainable_parameters(tuned):
            if name.endswith("down"):
                parameter.fill_(0.05)
    spt_dist.save_delta(tuned, f"{folder}/task.safetensors")
    loaded = spt_dist.load_delta(make_vit(), f"{folder}/task.safetensors")
    merged = spt_dist.merge(loaded)
    assert torch.allclose(merged(images), tuned(images), rtol=1e-4, atol=1e-5)
    return dict(merged.state_dict())


@pytest.mark.distributed
def test_one_process_and_two_ranks_make_the_same_merged_model(tmp_path: Path) -> None:
    one = whole_job(str(tmp_path / "one"))
    for merged in run_ranks(whole_job, 2, str(tmp_path / "two")):
        assert merged.keys() == one.keys()
        assert all(torch.equal(value, one[name]) for name, value in merged.items())


def test_any_module_of_linear_and_norm_layers_will_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3, bias=False)).eval()
    x, y = torch.randn(9, 6), torch.randint(3, (9,))
    scores = spt_dist.estimate_sensitivity(model, [(x, y)], F.cross_entropy)
    assert scores.names == ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")
    plan = spt_dist.allocate(scores, budget=60, rank=1)
    assert plan.head == []
    before = model(x)
    tuned = spt_dist.inject(model, plan)
    assert torch.equal(tuned(x), before)
    assert sum(parameter.numel() for _, parameter in spt_dist.trainable_parameters(tuned)) == plan.num_trainable <= 60
    for _, parameter in spt_dist.trainable_parameters(tuned):
        parameter.data += 0.1 * torch.randn_like(parameter)
    merged = spt_dist.merge(tuned)
    assert [type(module) for module in merged] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
    assert not torch.allclose(merged(x), before, atol=1e-2)
    assert torch.allclose(merged(x), tuned(x), atol=1e-5)
