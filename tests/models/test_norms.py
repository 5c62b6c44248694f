"""Batch norm over ranks, against torch's batch norm of all samples in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spt_dist.models.norms import CpuSyncBatchNorm, synchronise
from tests.ranks import run_ranks

# Ranks get 3 and 5 samples of these, so that the mean of the ranks' means is not the mean.
CUTS = {1: [8], 2: [3, 5], 4: [1, 3, 2, 2]}


def make_input() -> Tensor:
    """8 samples, 4 channels, of another mean and spread each."""
    generator = torch.Generator().manual_seed(2)
    offsets_B111 = torch.arange(8.0).view(-1, 1, 1, 1)
    return torch.randn(8, 4, 5, 3, generator=generator) * (1 + offsets_B111) + offsets_B111


def run_norm(norm: nn.Module, mine_BCHW: Tensor) -> dict[str, Tensor]:
    """Two training steps' outputs and gradients, the running means, and an output by these."""
    mine_BCHW = mine_BCHW.clone().requires_grad_()
    norm.train()
    norm(mine_BCHW + 1)
    outputs_BCHW = norm(mine_BCHW)
    (outputs_BCHW * torch.linspace(-1, 2, 4).view(1, 4, 1, 1) * mine_BCHW.detach().sin()).sum().backward()
    found = {"output": outputs_BCHW.detach(), "input.grad": mine_BCHW.grad}
    found |= {name: parameter.grad for name, parameter in norm.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in norm.named_buffers() if buffer.is_floating_point()}
    return found | {"eval": norm.eval()(mine_BCHW).detach()}


def make_norm(kind: type[nn.Module]) -> Any:
    """With other than its initial weights."""
    norm: Any = kind(4, eps=1e-3, momentum=0.3)
    norm.weight.data.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    norm.bias.data.copy_(torch.arange(4.0))
    return norm


def own_share(kind: type[nn.Module]) -> dict[str, Tensor]:
    """This rank's share of ``make_input``, of unequal sizes."""
    norm = make_norm(kind)
    synchronise(nn.Sequential(norm), torch.device("cpu"))
    return run_norm(norm, make_input().split(CUTS[dist.get_world_size()])[dist.get_rank()])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "world_size"), [(nn.SyncBatchNorm, 1), (nn.SyncBatchNorm, 2), (nn.BatchNorm2d, 2), (nn.SyncBatchNorm, 4)]
)
def test_ranks_together_are_torchs_batch_norm(kind: type[nn.Module], world_size: int) -> None:
    expected = run_norm(make_norm(nn.BatchNorm2d), make_input())
    parts = run_ranks(own_share, world_size, kind)
    for name in ("output", "input.grad", "eval"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected[name], rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        torch.testing.assert_close(sum(part[name] for part in parts), expected[name], rtol=1e-4, atol=1e-4)
    for part in parts:
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(part[name], expected[name])


def test_without_a_process_group_it_is_batch_norm() -> None:
    norm = make_norm(nn.SyncBatchNorm)
    synchronise(norm, torch.device("cpu"))
    assert type(norm) is CpuSyncBatchNorm
    found, expected = run_norm(norm, make_input()), run_norm(make_norm(nn.BatchNorm2d), make_input())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_the_mean_is_taken_off_before_digits_are_dropped() -> None:
    input_BCHW = (make_input() + 30).bfloat16()
    norm, exact = make_norm(nn.SyncBatchNorm).train(), make_norm(nn.BatchNorm2d).train()
    synchronise(norm, torch.device("cpu"))
    found = norm(input_BCHW)
    assert found.dtype == torch.bfloat16
    # As far as its own last digit tells.
    torch.testing.assert_close(found.float(), exact(input_BCHW.float()), rtol=2**-8, atol=1e-3)
