"""What can be made into shards: lists of labelled images, and images with masks."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spt_dist.data.image_set import ImageList
from spt_dist.data.pictures import decode
from spt_dist.data.samples import BadSampleError
from spt_dist.data.shards.tar import IMAGES, LABEL, MASK, MOST_SAMPLE_BYTES
from spt_dist.data.shards.writer import Members
from spt_dist.data.task import CLASSIFICATION, SEGMENTATION

Entry = tuple[str, int | str]
"""One sample: its image file, and its label or its mask's file; files relative to the root."""


@dataclass(frozen=True)
class Source:
    """A data set that is to be converted.

    Attributes:
        root: the folder that its files are relative to.
        kind: "classification" or "segmentation".
        classes: name of each class.
        splits: name of a split -> its samples.
    """

    root: Path
    kind: str
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Entry]]

    def read(self, entry: Entry, key: str) -> Members:
        """Read the files of a sample in full, and check them as training would.

        Args:
            entry: one of ``splits``.
            key: what its members are called, without an extension.

        Raises:
            BadSampleError: a file can't be read or decoded, or is called as no image is; a mask is none.
        """
        image_file, target = entry
        name = str(self.root / image_file)
        extension = PurePosixPath(image_file).suffix.lower().lstrip(".")
        if extension not in IMAGES:
            raise BadSampleError(f"{name}: its name ends in {extension!r}; in shards images end in {', '.join(IMAGES)}")
        content = _read_bytes(name)
        if isinstance(target, int):
            decode(content, name)
            second = (f"{key}.{LABEL}", b"%d" % target)
        else:
            mask_name = str(self.root / target)
            _require_pair(name, mask_name, len(self.classes))
            second = (f"{key}.{MASK}", _read_bytes(mask_name))
        if len(content) + len(second[1]) > MOST_SAMPLE_BYTES:
            raise BadSampleError(
                f"{name}: has {len(content):,} bytes; in shards a sample has at most {MOST_SAMPLE_BYTES:,}"
            )
        return [(f"{key}.{extension}", content), second]


def source_of_lists(lists: Mapping[str, ImageList]) -> Source:
    """Lists of the same data set: of one root, with the same classes."""
    first = next(iter(lists.values()))
    for images in lists.values():
        assert (images.root, images.classes) == (first.root, first.classes)
    splits = {split: list(zip(images.files, images.labels, strict=True)) for split, images in lists.items()}
    return Source(Path(first.root), CLASSIFICATION, tuple(first.classes), splits)


def source_of_ade20k(root: str | Path) -> Source:
    """The pairs of ADE20K, or of a data set of the same layout, as the splits "train" and "val".

    Raises:
        UserError: a folder is missing or has no images; an image or a mask is alone.
    """
    # Needs the segmentation extra.
    from spt_dist.data.ade20k import CHECK
    from spt_dist.data.ade20k_files import open_split

    splits, classes = {}, ()
    for split, name in (("train", "training"), ("val", "validation")):
        files = open_split(root, name)
        files.require_pairs(f"`{CHECK} {root}` lists all that is wrong")
        splits[split] = [(os.path.relpath(image, root), os.path.relpath(mask, root)) for image, mask in files.pairs()]
        classes = tuple(name.strip() for name in files.samples.metainfo["classes"])
    return Source(Path(root), SEGMENTATION, classes, splits)


def _read_bytes(name: str) -> bytes:
    """The content of a sample's file.

    Raises:
        BadSampleError: it can't be read.
    """
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise BadSampleError(f"{name}: can't be read ({error.strerror})") from error


def _require_pair(image: str, mask: str, num_classes: int) -> None:
    from spt_dist.data.pairs import examine

    problem = examine((image, mask), num_classes).problem
    if problem is not None:
        raise BadSampleError(problem)
