"""The files of ADE20K: which there are, which belong together, and which are good."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from mmengine.fileio import list_dir_or_file
from mmseg.datasets import ADE20KDataset

from spt_dist.data.ade20k_layout import NUM_CLASSES, SPLITS
from spt_dist.data.pairs import Pair, examine_all
from spt_dist.errors import UserError
from spt_dist.progress import progress_bar
from spt_dist.ranks import from_all_shares, own_share

NUM_NAMED = 3

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split.

    Attributes:
        name: "training" or "validation".
        samples: mmseg's data set, with every image.
        lone_images: images that have no mask.
        lone_masks: masks that have no image.
    """

    name: str
    samples: ADE20KDataset
    lone_images: list[str]
    lone_masks: list[str]

    def pairs(self) -> list[Pair]:
        """Image file and mask file of each sample, be they there or not."""
        return list(_pairs(self.samples))

    def require_pairs(self, advice: str) -> None:
        """Refuse a split in which an image or a mask is alone.

        Raises:
            UserError: naming the first.
        """
        for alone, other in ((self.lone_images, "mask"), (self.lone_masks, "image")):
            if alone:
                more = f" (and {len(alone) - 1:,} more)" if len(alone) > 1 else ""
                raise UserError(f"{alone[0]}{more}: has no {other}; {advice}")


def open_split(root: str | Path, name: str) -> SplitFiles:
    """Look what files there are.

    Args:
        root: the folder that has ``images`` and ``annotations``.
        name: "training" or "validation".

    Raises:
        UserError: a folder is missing or has no images.
    """
    split, root = SPLITS[name], Path(root)
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; ADE20K unpacks to ADEChallengeData2016, and "
            f"`python launch/prepare_data.py ade20k --make-scenes {root}` draws a small stand-in"
        )
    for folder in (split.images, split.masks):
        if not (root / folder).is_dir():
            raise UserError(f"{root / folder}: no such folder; the root has to be the folder that has images/ in it")
    images = root / split.images
    if next(iter(_files(images, ".jpg")), None) is None:
        raise UserError(f"{images}: has no .jpg files")
    samples = ADE20KDataset(
        data_root=str(root),
        data_prefix={"img_path": split.images, "seg_map_path": split.masks},
        pipeline=[],
        # It ends with a full garbage collection, and saves each worker some ten megabytes.
        serialize_data=False,
    )
    masks = set(_files(root / split.masks, ".png"))
    lone_images = [image for image, mask in _pairs(samples) if mask not in masks]
    lone_masks = sorted(masks - {mask for _, mask in _pairs(samples)})
    return SplitFiles(name, samples, lone_images, lone_masks)


def without_bad_samples(split: SplitFiles, num_threads: int) -> ADE20KDataset:
    """Examine all files and keep what is good: the same on every rank. Collective.

    Args:
        split: the files.
        num_threads: of this rank.

    Raises:
        UserError: nothing is good.
    """
    pairs = split.pairs()
    mine = own_share(pairs)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    problems: list[str | None] = []
    with progress_bar(f"examining {split.name} files", len(mine), is_first) as bar:
        for examined in examine_all(mine, NUM_CLASSES, num_threads):
            problems.append(examined.problem)
            bar.advance()
    found = from_all_shares(problems)
    good = [index for index, problem in enumerate(found) if problem is None]
    bad = [problem for problem in found if problem is not None] + [f"{mask}: has no image" for mask in split.lone_masks]
    if not good:
        raise UserError(f"none of the {len(pairs):,} {split.name} samples is good; the first: {bad[0]}")
    if not bad:
        return split.samples
    if is_first:
        named = bad[:NUM_NAMED] + [f"... and {len(bad) - NUM_NAMED:,} more"] * (len(bad) > NUM_NAMED)
        counts = f"{len(bad):,} bad {split.name} samples are left out, {len(good):,} remain"
        _logger.warning("%s:\n%s", counts, "\n".join(named))
    return split.samples.get_subset(good)


def _pairs(samples: ADE20KDataset) -> Iterator[Pair]:
    for index in range(len(samples)):
        info = samples.get_data_info(index)
        yield info["img_path"], info["seg_map_path"]


def _files(folder: Path, suffix: str) -> Iterator[str]:
    # As mmseg lists them, so that both go by the same rules (hidden files, links).
    for name in list_dir_or_file(str(folder), list_dir=False, suffix=suffix, recursive=True):
        yield str(folder / name)
