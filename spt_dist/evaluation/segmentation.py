"""Segmentation of held-out images that are dealt out to the ranks, and its mean IoU.

Shape suffixes: N windows, C channels, K classes, H height, W width of a view or of the image on disk; h, w of a window.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from mmseg.evaluation import IoUMetric
from torch import Tensor, nn

from spt_dist.data.loader import Skipped, load_items
from spt_dist.data.masked_images import IGNORED
from spt_dist.data.samples import BadSampleError
from spt_dist.data.segmentation_set import SegmentationSet
from spt_dist.data.segmentation_shards import SegmentationShards
from spt_dist.data.task import Task
from spt_dist.evaluation.left_out import tell_left_out
from spt_dist.evaluation.windows import Forward, enlarge, image_logits, lay_windows
from spt_dist.models.sharded import is_sharded
from spt_dist.progress import progress_bar
from spt_dist.sensitivity.shards import all_max, all_sum, collective_device, get_rank, world_size

HeldOut = SegmentationSet | SegmentationShards
WINDOWS_PER_PASS = 8
# With fewer images a progress bar would be gone before it is read.
MANY_IMAGES = 100


def evaluate_miou(
    forward: Forward,
    module: nn.Module,
    task: Task,
    device: torch.device,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    windows_per_pass: int = WINDOWS_PER_PASS,
) -> dict[str, float]:
    """Mean IoU and accuracies over the held-out images, by mmseg's rules; each image counts once. Collective.

    Args:
        forward: images ``(N, C, h, w)`` to the logits of each head, the decode head's first; the engine, or the model.
        module: the model behind it, put into eval mode meanwhile.
        task: whose held-out images to take.
        device: where the images go.
        scales: of the views of each image; the model's opinions on several are averaged.
        flip: whether each view is also seen mirrored.
        windows_per_pass: most windows in a forward pass.

    Returns:
        Shares of 1, the same on every rank: ``mIoU``, the mean over classes of the IoU over all pixels; ``mAcc``, the
        mean over classes of the share of their pixels found; ``aAcc``, the share of all pixels. A class that occurs
        nowhere is left out of the means.

    Raises:
        UserError: as ``lay_windows``.
    """
    images = segment_images(forward, module, task, device, range(task.num_val), scales, flip, windows_per_pass)
    # Intersection, union, predicted and true area. mmseg adds up in fp32, which cannot count beyond 16 million.
    areas_4K = torch.zeros(4, task.num_classes, dtype=torch.float64)
    for _, prediction_HW, label_HW in images:
        areas = IoUMetric.intersect_and_union(prediction_HW, label_HW, task.num_classes, IGNORED)
        areas_4K += torch.stack(areas).double()
    shares = IoUMetric.total_area_to_metrics(*all_sum(areas_4K.to(collective_device())).cpu())
    return {
        "mIoU": float(np.nanmean(shares["IoU"])),
        "mAcc": float(np.nanmean(shares["Acc"])),
        "aAcc": float(shares["aAcc"]),
    }


@torch.no_grad()
def segment_images(
    forward: Forward,
    module: nn.Module,
    task: Task,
    device: torch.device,
    indices: Sequence[int],
    scales: Sequence[float],
    flip: bool,
    windows_per_pass: int = WINDOWS_PER_PASS,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Segment this rank's share of some held-out images. Collective where the model is sharded: take all of them.

    Args:
        forward, module, task, device, scales, flip, windows_per_pass: as ``evaluate_miou``.
        indices: of the images in the set, the same on every rank.

    Yields:
        ``(index, prediction_HW, label_HW)``, both int64 and on the CPU, of the image's size on disk.
    """
    # Neighbours stay together: they may lie in one shard.
    first, last = (len(indices) * rank // world_size() for rank in (get_rank(), get_rank() + 1))
    mine = list(indices[first:last])
    sharded, skipped = is_sharded(module), Skipped()
    # A rank without an image in the last round still needs pixels to pass through a sharded model.
    num_idle = -(-len(indices) // world_size()) - len(mine) if sharded else 0
    held_out = cast(HeldOut, task.val)
    wanted = mine + list(indices[:num_idle])
    items = load_items(held_out.views(scales), wanted)
    was_training = module.training
    module.eval()
    try:
        with progress_bar("evaluation", len(mine), get_rank() == 0 and len(indices) >= MANY_IMAGES) as bar:
            for place, item in enumerate(items):
                found, label_HW = item if not isinstance(item, BadSampleError) else _stand_in(held_out)
                if isinstance(item, BadSampleError):
                    skipped.add(wanted[place], str(item))
                is_mine = place < len(mine) and wanted[place] not in skipped.indices
                views = [view_CHW.to(device) for view_CHW in found]
                windows = [lay_windows(view_CHW.shape[1:], module.test_cfg) for view_CHW in views]  # type: ignore[arg-type]
                num_passes = (1 + flip) * sum(laid.num_passes(windows_per_pass) for laid in windows) if is_mine else 0
                with in_step(forward, sharded, num_passes, windows[0].cut(views[0], 0, 1)):
                    if is_mine:
                        prediction_HW = predict(forward, module, views, label_HW.shape, flip, windows_per_pass)
                if is_mine:
                    yield mine[place], prediction_HW.cpu(), label_HW
                    bar.advance()
        tell_left_out(skipped, task)
    finally:
        module.train(was_training)


def _stand_in(held_out: HeldOut) -> Any:
    """In the place of an image that can't be read: pixels to pass through a sharded model."""
    image_CHW, label_HW = held_out.blank()
    return [image_CHW], label_HW


@contextmanager
def in_step(forward: Forward, sharded: bool, num_passes: int, spare_NChw: Tensor) -> Iterator[None]:
    """Have every rank run equally many forward passes, as each pass of a sharded model is collective.

    Args:
        forward: the model.
        sharded: whether the model is sharded; if not, nothing is done and nothing communicated.
        num_passes: how many this rank runs within the block, different ones on different ranks.
        spare_NChw: what this rank passes through the model after the block, until it has run as many as the busiest.
    """
    # Counted before the first pass: afterwards the busiest rank would wait within a pass for those that ask for its
    # count.
    num_missing = all_max(num_passes) - num_passes if sharded else 0
    yield
    for _ in range(num_missing):
        forward(spare_NChw)


@torch.no_grad()
def predict(
    forward: Forward,
    module: nn.Module,
    views: Sequence[Tensor],
    size: tuple[int, int],
    flip: bool,
    windows_per_pass: int = WINDOWS_PER_PASS,
) -> Tensor:
    """The most likely class of each pixel, by what the model makes of several views of an image.

    One view is decided by its logits, several by the mean of their softmax. The logits of one view are in memory at a
    time.

    Args:
        forward, module, flip, windows_per_pass: as ``evaluate_miou``; the module is in eval mode.
        views: the image at each scale, fp32 ``(C, H, W)``.
        size: ``(H, W)`` of the result.

    Returns:
        int64 ``(H, W)``.
    """
    if len(views) == 1 and not flip:
        # Exact, where two classes' softmax may round to the same number.
        return enlarge(image_logits(forward, module, views[0], windows_per_pass), size, module).argmax(dim=0)
    totals_KHW = torch.zeros(int(module.out_channels), *size, device=views[0].device)  # type: ignore[arg-type]
    for view_CHW in views:
        for mirrored in (False, True) if flip else (False,):
            totals_KHW += _shares(forward, module, view_CHW, size, mirrored, windows_per_pass)
    return totals_KHW.argmax(dim=0)


def _shares(
    forward: Forward, module: nn.Module, view_CHW: Tensor, size: tuple[int, int], mirrored: bool, windows_per_pass: int
) -> Tensor:
    """Softmax over the classes of one view's logits, the right way round and of the image's size: ``(K, H, W)``."""
    seen_CHW = view_CHW.flip(-1) if mirrored else view_CHW
    logits_KHW = image_logits(forward, module, seen_CHW, windows_per_pass)
    logits_KHW = enlarge(logits_KHW.flip(-1) if mirrored else logits_KHW, size, module)
    # In place, as logits of a large image fill gigabytes.
    logits_KHW -= logits_KHW.amax(dim=0)
    logits_KHW.exp_()
    return logits_KHW.div_(logits_KHW.sum(dim=0))
