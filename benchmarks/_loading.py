"""Photographs on a disk, as files and as shards, and the loaders that read them.

Shape suffixes: B images, C channels, H rows, W columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import spt_dist  # noqa: F401  # isort: skip  # makes torchvision importable beside a CPU torch

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, Normalize, PILToTensor, Resize, ToTensor

from spt_dist.data.batches import GlobalBatches
from spt_dist.data.image_set import ImageSet
from spt_dist.data.lists.image_folder import folder_classes, read_image_folder
from spt_dist.data.loader import AnySet, load_batches, order_of
from spt_dist.data.mini.photos import PHOTOS, load_photo
from spt_dist.data.pictures import PicturePreparation
from spt_dist.data.samples import Item, RawSample
from spt_dist.data.shards.convert import convert
from spt_dist.data.shards.index import INDEX_NAME
from spt_dist.data.shards.require import load_index
from spt_dist.data.shards.shard_set import ShardSet
from spt_dist.data.shards.sources import source_of_lists

SPLIT = "train"
NUM_SHARDS = 16
# What is read from shards is shuffled within so many samples, by us and by webdataset.
WINDOW = 1000
QUALITY = 92
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
# The yardsticks.
IMAGE_FOLDER, ONLY_READ = "ImageFolder", "webdataset, reading only"
OURS_ONLY_READ = "spt_dist, reading only"

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Reading:
    """What a loader is asked for: one epoch, shuffled.

    Attributes:
        folder: of ``make_data``.
        num_workers: processes that read, beside this one.
        batch_size: images in a batch.
        image_size: edge of the square that images are resized to, in pixels.
    """

    folder: Path
    num_workers: int
    batch_size: int = 64
    image_size: int = 224


class Sizes:
    """A preparation that decodes nothing: of an image the number of bytes is kept."""

    def prepare(self, sample: RawSample, epoch: int | None, index: int) -> Item:
        """The number as a tensor, and the label."""
        return torch.tensor(len(sample.image)), sample.target

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """The numbers, int64 ``(B,)``."""
        return torch.stack(list(inputs))

    def blank(self) -> Item:
        """No bytes, of class 0."""
        return torch.tensor(0), 0


def make_data(folder: Path, num_images: int) -> None:
    """Crops of photographs of scikit-image and scikit-learn, as JPEG files of 330 to 500 pixels a side and as shards.

    Args:
        folder: gets ``files/train/CLASS/`` and ``shards/``; what is complete there stays as it is.
        num_images: how many, in turn of each photograph.
    """
    if (folder / "shards" / INDEX_NAME).is_file():
        return
    photos = {label: Image.fromarray(load_photo(name)).convert("RGB") for label, name in PHOTOS.items()}
    rng = np.random.default_rng(0)
    for number in range(num_images):
        label = list(photos)[number % len(photos)]
        path = folder / "files" / SPLIT / label / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        _crop(photos[label], rng).save(path, quality=QUALITY)
    files = folder / "files"
    images = read_image_folder(files, SPLIT, folder_classes(files, SPLIT))
    convert(
        source_of_lists({SPLIT: images}),
        folder / "shards",
        num_threads=2,
        shard_size=-(-num_images // NUM_SHARDS),
        show_progress=False,
    )


def _crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Some 3/4 of a photograph, its longer side of 400 to 500 pixels and the shorter one of 2/3 of that at least."""
    longer = int(rng.integers(400, 501))
    edges = [longer, int(longer * rng.uniform(2 / 3, 1))]
    width, height = edges if photo.width >= photo.height else edges[::-1]
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.75, 1)
    left = rng.uniform(0, photo.width - scale * width)
    top = rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return photo.resize((width, height), Image.Resampling.BICUBIC, box=box)


def read_shards(reading: Reading) -> Batches:
    """Ours, from shards."""
    return _ours(_shard_set(reading, PicturePreparation("vtab", reading.image_size)), reading)


def read_files(reading: Reading) -> Batches:
    """Ours, from files."""
    root = reading.folder / "files"
    images = read_image_folder(root, SPLIT, folder_classes(root, SPLIT))
    preparation = PicturePreparation("vtab", reading.image_size)
    return _ours(ImageSet(images, preparation, in_memory=False, num_workers=reading.num_workers), reading)


def read_image_folder_of_torchvision(reading: Reading) -> Batches:
    """torchvision's ImageFolder and torch's DataLoader."""
    dataset = ImageFolder(str(reading.folder / "files" / SPLIT), _transform(reading.image_size))
    yield from DataLoader(dataset, reading.batch_size, shuffle=True, num_workers=reading.num_workers)


def read_image_folder_late(reading: Reading) -> Batches:
    """The same, but what leaves the workers is in grey levels, as ours, and is normalised here."""
    dataset = ImageFolder(str(reading.folder / "files" / SPLIT), _grey_levels(reading.image_size))
    loader = DataLoader(dataset, reading.batch_size, shuffle=True, num_workers=reading.num_workers)
    return _normalised(loader)


def read_webdataset(reading: Reading) -> Batches:
    """webdataset, as its documentation has it."""
    return _webdataset(reading, ["pil"], _transform(reading.image_size))


def read_webdataset_late(reading: Reading) -> Batches:
    """The same, but what leaves the workers is in grey levels, as ours, and is normalised here."""
    return _normalised(_webdataset(reading, ["pil"], _grey_levels(reading.image_size)))


def only_read_shards(reading: Reading) -> Batches:
    """Ours, from shards, without decoding."""
    return _ours(_shard_set(reading, Sizes()), reading)


def only_read_webdataset(reading: Reading) -> Batches:
    """webdataset without decoding."""
    return _webdataset(reading, [], len)


LOADERS: dict[str, Callable[[Reading], Batches]] = {
    "spt_dist, shards": read_shards,
    "spt_dist, files": read_files,
    IMAGE_FOLDER: read_image_folder_of_torchvision,
    "ImageFolder, late": read_image_folder_late,
    "webdataset": read_webdataset,
    "webdataset, late": read_webdataset_late,
    OURS_ONLY_READ: only_read_shards,
    ONLY_READ: only_read_webdataset,
}


def _shard_set(reading: Reading, preparation: Any) -> ShardSet:
    root = str(reading.folder / "shards")
    return ShardSet(
        root, load_index(root), SPLIT, preparation, lanes=NUM_SHARDS, window=WINDOW, num_workers=reading.num_workers
    )


def _ours(dataset: AnySet, reading: Reading) -> Batches:
    batches = GlobalBatches(len(dataset), reading.batch_size, seed=0, order=order_of(dataset))  # type: ignore[arg-type]
    for batch in load_batches(dataset, batches.epoch(), CPU):
        yield batch.inputs, batch.targets


def _webdataset(reading: Reading, decoders: list[str], prepare: Callable[[Any], Any]) -> Batches:
    shards = sorted(map(str, (reading.folder / "shards").glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=100, workersplitter=webdataset.split_by_worker)
    dataset = dataset.shuffle(WINDOW).decode(*decoders) if decoders else dataset.shuffle(WINDOW)
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(prepare, int).batched(reading.batch_size)
    for inputs, targets in webdataset.WebLoader(dataset, batch_size=None, num_workers=reading.num_workers):
        yield torch.as_tensor(inputs), torch.as_tensor(targets)


def _transform(image_size: int) -> Any:
    return Compose([_square(image_size), ToTensor(), Normalize(MEAN, STD)])


def _grey_levels(image_size: int) -> Any:
    return Compose([_square(image_size), PILToTensor()])


def _square(image_size: int) -> Any:
    return Resize((image_size, image_size), InterpolationMode.BICUBIC)


def _normalised(batches: Any) -> Batches:
    normalise = Normalize(MEAN, STD, inplace=True)
    for images_BCHW, targets in batches:
        yield normalise(images_BCHW.float().div_(255)), targets
