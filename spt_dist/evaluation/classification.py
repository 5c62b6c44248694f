"""Top-1 accuracy over a data set that is dealt out to the ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spt_dist.data.batches import GlobalBatches, load_batches
from spt_dist.data.task import Task


@torch.no_grad()
def evaluate_top1(
    forward: Callable[[Tensor], Tensor], module: nn.Module, task: Task, batch_size: int, device: torch.device
) -> float:
    """Share of held-out samples whose highest output is their label; each sample counts once. Collective.

    Args:
        forward: images ``(B, C, H, W)`` to outputs ``(B, K)``; the engine, or the model itself.
        module: the module behind it, put into eval mode meanwhile.
        task: whose held-out samples to take.
        batch_size: samples in a global batch.
        device: where the samples go.

    Returns:
        Between 0 and 1, the same on every rank.
    """
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    batches = GlobalBatches(task.num_val, batch_size, rank, world_size)
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = module.training
    module.eval()
    for batch in load_batches(task.val, batches.deal(), device):
        hits = forward(batch.inputs).argmax(dim=-1) == batch.targets
        counts += torch.stack([(hits * batch.weights).sum(), batch.weights.sum()])
    module.train(was_training)
    if distributed:
        dist.all_reduce(counts)
    return float(counts[0] / counts[1])
