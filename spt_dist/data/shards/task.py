"""Shards as a classification task."""

from typing import Any

from spt_dist.data.pictures import PicturePreparation
from spt_dist.data.shards.index import INDEX_NAME
from spt_dist.data.shards.openers import shown
from spt_dist.data.shards.require import check_lanes, load_index, require_shards
from spt_dist.data.shards.shard_set import ShardSet
from spt_dist.data.task import CLASSIFICATION, Task
from spt_dist.errors import UserError


def build_shards(
    root: str,
    train: str = "train",
    val: str = "val",
    transform: str = "vtab",
    image_size: int = 224,
    num_workers: int = 4,
    skip_bad_samples: bool = False,
    lanes: int = 16,
    window: int = 1000,
    on_device: bool = False,
    normalize: str | dict[str, Any] | None = None,
) -> Task:
    """Shards with an index, as ``launch/prepare_data.py`` writes them, as a classification task. Collective.

    Args:
        root: where ``index.json`` and the shards are: a folder, a URL (http, https, s3, gs), or ``pipe:COMMAND`` with
            ``{}`` for the name of a file.
        train, val: names of splits.
        transform: how images are prepared; one of ``transforms.TRANSFORMS``.
        image_size: edge of the square that the model takes, in pixels.
        num_workers: processes of each rank that read samples, beside the rank's own; 0 for none.
        skip_bad_samples: leave out, with a count, samples that can't be read, instead of ending the run.
        lanes, window: as of ``ShardSet``.
        on_device: cut and resize images where the model is, instead of in the workers.
        normalize: in place of the transform's normalisation, as of ``PicturePreparation``.

    Returns:
        a task of ``ShardSet``.

    Raises:
        UserError: an argument is out of range; there is no such index, split or transform; the shards are those of a
            segmentation task; a shard is missing.
    """
    if num_workers < 0:
        raise UserError(f"config: data.num_workers={num_workers} has to be 0 or more")
    check_lanes(lanes, window)
    preparation = PicturePreparation(transform, image_size, on_device, normalize)
    index = load_index(root)
    if index.kind != CLASSIFICATION:
        raise UserError(
            f"{shown(root, INDEX_NAME)}: kind={index.kind!r}, but data.type='shards' is for {CLASSIFICATION!r}"
        )
    for split in dict.fromkeys((train, val)):
        require_shards(root, index.split(split, root))
    train_set, val_set = (
        ShardSet(
            root,
            index,
            split,
            preparation,
            lanes=lanes,
            window=window,
            skip_bad=skip_bad_samples,
            num_workers=num_workers,
        )
        for split in (train, val)
    )
    contents = index.split(train, root).digest()
    return Task(train_set, val_set, len(train_set), len(val_set), len(index.classes), contents=contents)
