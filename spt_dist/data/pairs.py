"""An image and its mask: whether the two files are what they should be.

Decoders are lenient: OpenCV fills what a cut-off JPEG lacks with grey, and mmseg folds a 16-bit mask into 8 bits.

Shape suffixes: H rows, W columns, K values of a mask.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import mmcv
import numpy as np
import numpy.typing as npt
from PIL import Image

from spt_dist.data.samples import BadSampleError

Pair = tuple[str, str]

_JPEG: Final = b"\xff\xd8"
_JPEG_END: Final = b"\xd9"
# Within compressed data a byte 0xff is followed by 0, or by a restart marker.
_JPEG_MARKER: Final = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
# One byte a pixel: grey, or numbers of a palette's colours, which is how some tools save labels.
_MASK_MODES: Final = ("L", "P")


@dataclass(frozen=True)
class Examined:
    """What became of one pair.

    Attributes:
        problem: what is wrong, ``None`` if nothing is.
        counts_K: how many pixels have each of the mask's values; ``None`` if something is wrong.
    """

    problem: str | None
    counts_K: npt.NDArray[np.int64] | None


def read_mask(pair: Pair, num_classes: int) -> npt.NDArray[np.uint8]:
    """Read a pair's mask, and check all that can be checked without decoding the image.

    Args:
        pair: paths of image and mask.
        num_classes: the mask's values are 0 to ``num_classes``.

    Returns:
        the mask as it is in the file, uint8 ``(H, W)``.

    Raises:
        BadSampleError: a file can't be read or is cut off; the mask is none.
    """
    image_path, mask_path = pair
    content = _read(image_path)
    if not content.startswith(_JPEG):
        _open(content, image_path)
    elif not _has_jpeg_end(content):
        raise BadSampleError(f"{image_path}: its end is missing, {len(content):,} bytes are there")
    mask = _open(_read(mask_path), mask_path)
    if mask.mode not in _MASK_MODES:
        raise BadSampleError(f"{mask_path}: mode {mask.mode!r}; a mask has one channel of 8 bits (mode 'L')")
    labels_HW = np.asarray(mask)
    highest = labels_HW.max()
    if highest > num_classes:
        raise BadSampleError(f"{mask_path}: has the value {highest}; a mask's values are 0 to {num_classes}")
    return labels_HW


def check_size(pair: Pair, image_size: Sequence[int], mask_size: Sequence[int]) -> None:
    """Compare the sizes ``(H, W)`` of an image and its mask.

    Raises:
        BadSampleError: they differ.
    """
    if tuple(image_size) != tuple(mask_size):
        (height, width), (mask_height, mask_width) = image_size, mask_size
        raise BadSampleError(
            f"{pair[1]}: has {mask_width} x {mask_height} pixels, but its image {pair[0]} has {width} x {height}"
        )


def examine(pair: Pair, num_classes: int) -> Examined:
    """Read both files in full, as training does."""
    try:
        labels_HW = read_mask(pair, num_classes)
        image_HWC = mmcv.imfrombytes(_read(pair[0]))
        if image_HWC is None:
            raise BadSampleError(f"{pair[0]}: can't be decoded")
        check_size(pair, image_HWC.shape[:2], labels_HW.shape)
    except BadSampleError as error:
        return Examined(str(error), None)
    return Examined(None, np.bincount(labels_HW.ravel(), minlength=num_classes + 1))


def examine_all(pairs: Sequence[Pair], num_classes: int, num_threads: int) -> Iterator[Examined]:
    """Examine many pairs at once.

    Yields:
        for each pair, in order, what became of it.
    """
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield from pool.map(lambda pair: examine(pair, num_classes), pairs)
    finally:
        # Whoever stops half-way does not wait for the rest.
        pool.shutdown(cancel_futures=True)


def _read(path: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadSampleError(f"{path}: can't be read ({error.strerror})") from error
    if not content:
        raise BadSampleError(f"{path}: is empty")
    return content


def _open(content: bytes, path: str) -> Image.Image:
    """The decoded image."""
    try:
        image = Image.open(BytesIO(content))
        image.load()
    # A decoder that meets a damaged file raises nearly anything.
    except Exception as error:
        raise BadSampleError(f"{path}: can't be decoded ({str(error) or type(error).__name__})") from error
    return image


def _has_jpeg_end(content: bytes) -> bool:
    """Whether a JPEG's end marker is where one can be: behind a segment or compressed data, not inside a segment."""
    place = len(_JPEG)
    while marker := _JPEG_MARKER.search(content, place):
        if marker[1] == _JPEG_END:
            return True
        # The length counts itself.
        place = marker.end() + max(2, int.from_bytes(content[marker.end() : marker.end() + 2], "big"))
    return False
