"""ADE20K (Zhou et al. 2017), as the scene parsing challenge of 2016 has it: 150 classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spt_dist.data.ade20k_layout import NUM_CLASSES, SPLITS
from spt_dist.data.loader import AnySet
from spt_dist.data.shards.index import INDEX_NAME
from spt_dist.data.shards.openers import is_local, shown
from spt_dist.data.shards.require import check_lanes, load_index, require_shards
from spt_dist.data.task import SEGMENTATION, Task
from spt_dist.errors import UserError

if TYPE_CHECKING:  # it needs the extra
    from spt_dist.data.masked_images import MaskedSettings
    from spt_dist.data.segmentation_set import SegmentationSet
    from spt_dist.data.segmentation_shards import SegmentationShards

CHECK = "python launch/prepare_data.py ade20k --check"
CHECK_SHARDS = "python launch/prepare_data.py shards --check"


def build_ade20k(
    root: str,
    crop_size: Sequence[int] = (512, 512),
    scale: Sequence[int] = (2048, 512),
    num_workers: int = 4,
    mean: Sequence[float] = (123.675, 116.28, 103.53),
    std: Sequence[float] = (58.395, 57.12, 57.375),
    train_pipeline: Sequence[dict[str, Any]] | None = None,
    skip_bad_samples: bool = False,
    seed: int = 0,
    lanes: int = 16,
    window: int = 1000,
) -> Task:
    """ADE20K, or a data set of the same layout and classes, as a segmentation task.

    Args:
        root: the folder that has ``images`` and ``annotations``; or what has shards of them, with an index: a folder, a
            URL or a command, see ``shards.openers.open_stream``.
        crop_size: height and width of a training sample.
        scale: most pixels of the longer and of the shorter edge of an image; training makes it half to twice as large.
        num_workers: processes of each rank that prepare samples, beside the rank's own; 0 for none.
        mean, std: of red, green and blue, in grey levels from 0 to 255.
        train_pipeline: mmseg's transforms from the files to the crop, instead of those that SETR was published with.
            Normalisation and filling up to ``crop_size`` follow; a ``PackSegInputs`` among them is left out.
        skip_bad_samples: leave out samples whose files are not what they should be, instead of ending where one is
            met. All files are read for that before anything else, by all ranks together; but samples in shards are
            left out where they are met.
        seed: of the random transforms.
        lanes, window: of shards; as of ``ShardSet``.

    Returns:
        a task of ``SegmentationSet`` or ``SegmentationShards``.

    Raises:
        UserError: the extra is not installed; a folder or a file of a pair is missing; no sample is left; an argument
            is out of range.
    """
    require_extra("data.type='ade20k'")
    from spt_dist.data.masked_images import MaskedSettings

    if num_workers < 0:
        raise UserError(f"config: data.num_workers={num_workers} has to be 0 or more")
    if seed < 0:
        raise UserError(f"config: data.seed={seed} has to be 0 or more")
    crop = two_edges("crop_size", crop_size)
    edges = two_edges("scale", scale)
    pipeline = setr_pipeline(crop, edges) if train_pipeline is None else train_pipeline
    for place, config in enumerate(pipeline):
        if not isinstance(config, dict):
            raise UserError(f"config: data.train_pipeline[{place}]={config!r} has to be a dict")
    in_shards = not is_local(root) or Path(root, INDEX_NAME).is_file()
    check = CHECK_SHARDS if in_shards else CHECK
    settings = MaskedSettings(
        crop_size=crop,
        scale=edges,
        mean=_three_channels("mean", mean, -float("inf")),
        std=_three_channels("std", std, 0.0),
        pipeline=tuple(dict(config) for config in pipeline if config.get("type") != "PackSegInputs"),
        seed=seed,
        advice=f"mend it, or leave such samples out (--skip-bad-samples); `{check} {root}` lists them all",
    )
    sets: Sequence[AnySet]
    if in_shards:
        check_lanes(lanes, window)
        reading = {"lanes": lanes, "window": window, "skip_bad": skip_bad_samples, "num_workers": num_workers}
        sets = _from_shards(root, settings, reading)
    else:
        sets = _from_files(root, settings, num_workers, skip_bad_samples)
    train, val = sets
    return Task(train, val, len(train), len(val), NUM_CLASSES, SEGMENTATION, getattr(train, "contents", ""))


def _from_files(root: str, settings: "MaskedSettings", num_workers: int, skip_bad: bool) -> "list[SegmentationSet]":
    """The two sets of a folder with images and masks."""
    from mmseg.datasets import ADE20KDataset

    from spt_dist.data.ade20k_files import open_split, without_bad_samples
    from spt_dist.data.masked_images import MaskedImages
    from spt_dist.data.segmentation_set import SegmentationSet

    splits = [open_split(root, split) for split in SPLITS]
    if skip_bad:
        samples = [without_bad_samples(split, max(1, num_workers)) for split in splits]
    else:
        for split in splits:
            split.require_pairs(settings.advice)
        samples = [split.samples for split in splits]
    images = MaskedImages(settings, **ADE20KDataset.METAINFO)
    return [SegmentationSet(part, images, num_workers) for part in samples]


def _from_shards(root: str, settings: "MaskedSettings", reading: dict[str, Any]) -> "list[SegmentationShards]":
    """The two sets of shards, which are looked for by all ranks together."""
    from mmseg.datasets import ADE20KDataset

    from spt_dist.data.masked_images import MaskedImages
    from spt_dist.data.segmentation_shards import SegmentationShards

    index = load_index(root)
    if (index.kind, len(index.classes)) != (SEGMENTATION, NUM_CLASSES):
        raise UserError(
            f"{shown(root, INDEX_NAME)}: kind={index.kind!r} with {len(index.classes)} classes, but "
            f"data.type='ade20k' is for {SEGMENTATION!r} with {NUM_CLASSES}"
        )
    images = MaskedImages(settings, **ADE20KDataset.METAINFO)
    for split in ("train", "val"):
        require_shards(root, index.split(split, root))
    return [SegmentationShards(root, index, split, images, **reading) for split in ("train", "val")]


def require_extra(what: str) -> None:
    """Import what the extra ``segmentation`` brings.

    Raises:
        UserError: it is not installed; ``what`` needs it.
    """
    try:
        import mmseg.datasets  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{what} needs {error.name}: pip install 'spt_dist[segmentation]'") from error


def setr_pipeline(crop_size: tuple[int, int], scale: tuple[int, int]) -> list[dict[str, Any]]:
    """The transforms that SETR was trained with on ADE20K."""
    return [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations"},
        {"type": "RandomResize", "scale": scale, "ratio_range": (0.5, 2.0), "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": crop_size, "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
    ]


def two_edges(name: str, value: Sequence[int]) -> tuple[int, int]:
    """A size in pixels from a config's section ``data``.

    Raises:
        UserError: it is not two integers above 0.
    """
    if isinstance(value, str) or len(value) != 2 or not all(type(edge) is int and edge > 0 for edge in value):
        raise UserError(f"config: data.{name}={value!r} has to be two integers above 0")
    return value[0], value[1]


def _three_channels(name: str, value: Sequence[float], above: float) -> tuple[float, ...]:
    is_number = not isinstance(value, str) and all(type(number) in (int, float) for number in value)
    if not is_number or len(value) != 3 or not all(above < number < float("inf") for number in value):
        raise UserError(f"config: data.{name}={value!r} has to be three numbers{' above 0' if above == 0 else ''}")
    return tuple(float(number) for number in value)
