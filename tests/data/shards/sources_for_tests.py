"""Small image files, and lists of them."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from spt_dist.data.image_set import ImageList
from spt_dist.data.shards.sources import Source, source_of_lists

CLASSES = ("cat", "dog", "owl")


def picture(seed: int, format: str = "PNG", size: int = 8) -> bytes:
    """The content of a file with a noisy picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def write_list(root: Path, split: str, count: int, first_seed: int = 0, size: int = 8) -> ImageList:
    """Write picture files, every third a JPEG with an extension in capitals, with labels 0, 1, 2, 0, ..."""
    files = []
    for place in range(count):
        is_jpeg = place % 3 == 2
        file = f"{split}/{CLASSES[place % 3]}/a.b_{place}.{'JPEG' if is_jpeg else 'png'}"
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(first_seed + place, "JPEG" if is_jpeg else "PNG", size))
        files.append(file)
    return ImageList(root, files, [place % 3 for place in range(count)], CLASSES, f"{split} list")


def write_source(root: Path, num_train: int = 23, num_test: int = 7) -> Source:
    """A data set with the splits "train" and "test"."""
    lists = {
        "train": write_list(root, "train", num_train),
        "test": write_list(root, "test", num_test, first_seed=1000),
    }
    return source_of_lists(lists)
