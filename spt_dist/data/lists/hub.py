"""Data sets that timm can open: torchvision's, and those of the Hugging Face hub."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from torch import Tensor

from spt_dist.data.pictures import PicturePreparation
from spt_dist.data.samples import BadSampleError, Item, RawSample, SampleSet
from spt_dist.data.task import Task
from spt_dist.errors import UserError
from spt_dist.ranks import host_first

_PREFIXES: Final = ("hfds/", "torch/")
# timm takes the whole folder for each split where these have no folder of its name.
_FOLDERS: Final = ("torch/image_folder", "torch/folder")


class HubSet(SampleSet):
    """A data set that timm has opened.

    Args:
        dataset: of ``timm.data.create_dataset``.
        name: of data set and split, for errors.
        num_classes: classes are 0 to one less.
        preparation: how images become inputs.
        skip_bad: leave out images that can't be decoded.
        num_workers: processes that read samples.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        num_classes: int,
        preparation: PicturePreparation,
        skip_bad: bool,
        num_workers: int,
    ) -> None:
        self.skip_bad, self.num_workers = skip_bad, num_workers
        # timm's own data set would put the next sample in the place of one that it can't read.
        self._dataset = getattr(dataset, "reader", dataset)
        self._name, self._num_classes, self._preparation = name, num_classes, preparation

    def __len__(self) -> int:
        return len(self._dataset)

    def item(self, epoch: int | None, index: int) -> Item:
        """See ``SampleSet``."""
        name = f"{self._name}: sample {index}"
        try:
            image, label = self._dataset[index]
            # timm's readers open files; torchvision's data sets decode them.
            content = image.read() if hasattr(image, "read") else None
        except OSError as error:
            raise BadSampleError(f"{name}: can't be read ({error})") from error
        if type(label) is not int or not 0 <= label < self._num_classes:
            raise BadSampleError(f"{name}: class {label!r} has to lie between 0 and {self._num_classes - 1}")
        if content is not None:
            return self._preparation.prepare(RawSample(name, content, label), epoch, index)
        return self._preparation.prepare_picture(image.convert("RGB"), name, epoch, index), label

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """See ``SampleSet``."""
        return self._preparation.finish(inputs, epoch, indices)

    def blank(self) -> Item:
        """See ``SampleSet``."""
        return self._preparation.blank()


def build_hub(
    name: str,
    num_classes: int,
    root: str | None = None,
    train: str = "train",
    val: str = "validation",
    image_column: str | None = None,
    label_column: str | None = None,
    transform: str = "vtab",
    image_size: int = 224,
    num_workers: int = 4,
    skip_bad_samples: bool = False,
    on_device: bool = False,
    normalize: str | dict[str, Any] | None = None,
) -> Task:
    """A data set by the name that timm has for it. Of torchvision's nothing is downloaded.

    Args:
        name: "hfds/" and a data set of the Hugging Face hub, or the folder of one; or "torch/" and one of torchvision's
            that timm knows.
        num_classes: outputs of the head.
        root: the folder that the data set is in, or where the hub's are kept.
        train, val: splits that train and are held out.
        image_column, label_column: columns of a data set of the hub; ``None`` for "image" and "label".
        transform, image_size, num_workers, skip_bad_samples, on_device, normalize: as of ``picture_task``.

    Raises:
        UserError: timm has no such data set or can't open it, or ``datasets`` is not installed; an argument is out of
            range, or columns are given of a data set that has none.
    """
    if num_classes < 1:
        raise UserError(f"config: data.num_classes={num_classes} has to be at least 1")
    if num_workers < 0:
        raise UserError(f"config: data.num_workers={num_workers} has to be 0 or more")
    # Named as timm names them.
    named = {"input_key": image_column, "target_key": label_column}
    columns = {key: column for key, column in named.items() if column is not None}
    if columns and not name.startswith("hfds/"):
        raise UserError(f"config: data.name={name!r} has no columns; leave out data.image_column and data.label_column")
    preparation = PicturePreparation(transform, image_size, on_device, normalize)
    train_set, val_set = (
        HubSet(
            # What is downloaded is kept: one rank does it for those who find it then.
            host_first(partial(_open, name, root, split, columns)),
            f"{name}, {split}",
            num_classes,
            preparation,
            skip_bad_samples,
            num_workers,
        )
        for split in (train, val)
    )
    return Task(train_set, val_set, len(train_set), len(val_set), num_classes)


def _open(name: str, root: str | None, split: str, columns: dict[str, Any]) -> Any:
    if not name.startswith(_PREFIXES) or name in _FOLDERS:
        raise UserError(
            f"config: data.name={name!r} has to begin with {' or '.join(map(repr, _PREFIXES))}; for folders there is "
            "data.type='image_folder', for shards 'shards'"
        )
    from timm.data import create_dataset

    try:
        return create_dataset(name, root, split=split, **columns)
    except ModuleNotFoundError as error:
        raise UserError(f"config: data.name={name!r} needs {error.name}: pip install {error.name}") from error
    # What timm, torchvision and datasets raise for what they don't find is of many kinds.
    except Exception as error:
        raise UserError(f"config: data.name={name!r}, split {split!r}: {type(error).__name__}: {error}") from error
