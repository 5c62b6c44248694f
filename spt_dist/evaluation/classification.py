"""Top-1 accuracy over a data set that is dealt out to the ranks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spt_dist.data.batches import GlobalBatches
from spt_dist.data.loader import Skipped, load_batches, order_of
from spt_dist.data.task import Task
from spt_dist.evaluation.left_out import tell_left_out
from spt_dist.sensitivity.shards import all_sum, get_rank, world_size


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

    Raises:
        UserError: no sample can be read.
    """
    batches = GlobalBatches(task.num_val, batch_size, get_rank(), world_size(), order=order_of(task.val))
    skipped = Skipped()
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = module.training
    module.eval()
    for batch in load_batches(task.val, batches.epoch(), device, skipped):
        hits = forward(batch.inputs).argmax(dim=-1) == batch.targets
        counts += torch.stack([(hits * batch.weights).sum(), batch.weights.sum()])
    module.train(was_training)
    all_sum(counts)
    tell_left_out(skipped, task)
    return float(counts[0] / counts[1])
