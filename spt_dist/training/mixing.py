"""Mixing training images: MixUp (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019), torchvision's.

Shape suffixes: B samples, K classes.
"""

from collections.abc import Callable
from dataclasses import replace

from torchvision.transforms import v2

from spt_dist.data.loader import Batch
from spt_dist.data.task import SEGMENTATION, Task
from spt_dist.errors import UserError
from spt_dist.sections import TrainConfig

Mixing = Callable[[Batch], Batch]


def make_mixing(train: TrainConfig, task: Task) -> Mixing | None:
    """What a step does to the images and labels of its batch; ``None`` for nothing.

    The labels become shares of the classes, fp32 ``(B, K)``. Partners are images of one rank, so that the loss curve
    depends on the number of ranks.

    Raises:
        UserError: the task is not classification.
    """
    wanted = ((v2.MixUp, train.mixup), (v2.CutMix, train.cutmix))
    kinds = [kind(alpha=alpha, num_classes=task.num_classes) for kind, alpha in wanted if alpha]
    if not kinds:
        return None
    if task.kind == SEGMENTATION:
        raise UserError(
            f"config: train.mixup={train.mixup} and train.cutmix={train.cutmix} are for classification; leave them out"
        )
    mix = v2.RandomChoice(kinds)

    def mixing(batch: Batch) -> Batch:
        inputs, targets = mix(batch.inputs, batch.targets)
        return replace(batch, inputs=inputs, targets=targets)

    return mixing
