"""The metrics of a task's kind."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spt_dist.data.task import SEGMENTATION, Task
from spt_dist.evaluation.classification import evaluate_top1

# Name of a metric -> what people call it; the first of an evaluation's is the one that "best" means.
METRIC_LABELS = {"top1": "top-1", "mIoU": "mIoU", "mAcc": "mean accuracy", "aAcc": "pixel accuracy"}


# Sizes of SETR's multi-scale inference, each also mirrored; of the size of its single-scale inference.
MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def evaluate(
    forward: Callable[[Tensor], Any],
    module: nn.Module,
    task: Task,
    batch_size: int,
    device: torch.device,
    multi_scale: bool = False,
) -> dict[str, float]:
    """How good a model is on the held-out samples; each counts once. Collective.

    Args:
        forward: images ``(B, C, H, W)`` to the model's outputs; the engine, or the model itself.
        module: the module behind it, put into eval mode meanwhile.
        task: whose held-out samples to take.
        batch_size: of a classification task, images in a global batch.
        device: where the samples go.
        multi_scale: of a segmentation task, see each image in ``MULTI_SCALES`` and mirrored.

    Returns:
        Name of a metric -> share of 1, the same on every rank, the main one first: ``top1``; or ``mIoU``, ``mAcc`` and
        ``aAcc``.
    """
    if task.kind == SEGMENTATION:
        from spt_dist.evaluation.segmentation import evaluate_miou

        scales = MULTI_SCALES if multi_scale else (1.0,)
        return evaluate_miou(forward, module, task, device, scales, flip=multi_scale)
    return {"top1": evaluate_top1(forward, module, task, batch_size, device)}


def main_metric(scores: dict[str, float]) -> str:
    """The metric that "best" means: the first."""
    return next(iter(scores))
