"""Reading dealt batches, in worker processes or in the rank's own.

Shape suffixes: B samples.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, islice
from multiprocessing import parent_process
from threading import Thread
from typing import Any, Final, NoReturn

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from spt_dist.data.batches import Dealt, Order
from spt_dist.data.samples import BadSampleError, Item, SampleSet, StreamedSet
from spt_dist.errors import UserError

Collate = Callable[[list[int], list[Item | BadSampleError], "AnySet"], Any]
AnySet = SampleSet | StreamedSet | Dataset[Any]

# Batches that workers read ahead, for each of them.
_READ_AHEAD: Final = 2
_NUM_NAMED: Final = 10
_OUTLIVED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ORPHAN_SECONDS: Final = 2.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch.

    Attributes:
        inputs: ``(B, ...)``.
        targets: ``(B,)``, or ``(B, H, W)`` for segmentation.
        weights: fp32 ``(B,)``: 1 for a sample, 0 for one that only fills up the rank's part.
        num_global: samples of the global batch, over all ranks.
        samples: ids of the samples in the data set.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    num_global: int
    samples: list[int]

    def split(self, num_parts: int) -> "list[Batch]":
        """Equal parts of it, of the same global batch; fewer where there are fewer samples."""
        size = -(-len(self.samples) // num_parts)
        cuts = [slice(start, start + size) for start in range(0, len(self.samples), size)]
        return [
            Batch(self.inputs[cut], self.targets[cut], self.weights[cut], self.num_global, self.samples[cut])
            for cut in cuts
        ]


class Skipped:
    """Bad samples that were left out. The first few are named in the log, each once.

    Attributes:
        indices: of these samples in their set.
    """

    def __init__(self) -> None:
        self.indices: set[int] = set()

    def add(self, index: int, problem: str) -> None:
        """Count a sample."""
        if index not in self.indices and len(self.indices) <= _NUM_NAMED:
            more = " (others are counted without being named)" if len(self.indices) == _NUM_NAMED else ""
            _logger.warning("left out: %s%s", problem, more)
        self.indices.add(index)


def order_of(dataset: AnySet) -> Order | None:
    """The order that a data set wants to be read in, for ``GlobalBatches``."""
    return dataset.order if isinstance(dataset, StreamedSet) else None


def load_batches(
    dataset: AnySet,
    batches: Iterable[Dealt],
    device: torch.device,
    skipped: Skipped | None = None,
    num_workers: int | None = None,
) -> Iterator[Batch]:
    """Read the samples of each batch.

    Args:
        dataset: the samples; of a map-style data set of torch's an item is ``(input, target)``.
        batches: something that can be gone through several times.
        device: where the tensors go.
        skipped: is told of bad samples, where the data set leaves them out; they get weight 0.
        num_workers: processes that read them, 0 for this one; ``None`` for as many as the data set asks for.

    Raises:
        UserError: a sample can't be read, and the data set does not leave such samples out.
    """
    if num_workers is None:
        num_workers = _num_workers(dataset)
    parts = _read_parts(dataset, batches, _collate, num_workers, pin_memory=device.type == "cuda" and num_workers > 0)
    skipped = skipped or Skipped()
    for dealt in batches:
        yield _assemble(dataset, dealt, list(islice(parts, max(1, num_workers))), device, skipped)


def load_items(dataset: AnySet, indices: Sequence[int]) -> Iterator[Item | BadSampleError]:
    """Read samples one by one, as held-out ones are read; a bad one, where those are left out, is its error."""
    singles = [Dealt(None, [index], [1.0], 1) for index in indices]
    for found in _read_parts(dataset, singles, _keep, _num_workers(dataset)):
        yield from found


def leaves_out_bad(dataset: AnySet) -> bool:
    """Whether bad samples are left out, with a count, instead of ending the run."""
    return getattr(dataset, "skip_bad", False)


def _num_workers(dataset: AnySet) -> int:
    return getattr(dataset, "num_workers", 0)


def _read_parts(
    dataset: AnySet, batches: Iterable[Dealt], collate: Collate, num_workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """What each worker in turn has read of each batch.

    A mistake of the user's that a worker met is told as the rank itself would.

    Raises:
        UserError: a sample can't be read.
    """
    loader = DataLoader(
        _Parts(dataset, batches, collate),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_is,
        # Without one of its own the loader draws from the global one, and training would depend on being evaluated.
        generator=torch.Generator(),
        worker_init_fn=_outlive_signals,
        # Each has a part of every batch, be it empty.
        prefetch_factor=_READ_AHEAD * num_workers if num_workers else None,
        pin_memory=pin_memory,
    )
    try:
        yield from _start(loader)
    except UserError as error:
        # torch raises a worker's error again with the worker's traceback as its text.
        for kind in (BadSampleError, UserError):
            _, found, text = str(error).rpartition(f"{kind.__module__}.{kind.__name__}: ")
            if found:
                raise UserError(text.strip()) from error
        raise


@dataclass
class _Part:
    """What one worker has read of a batch.

    Attributes:
        places: of its samples in the rank's part.
        inputs: of these; one tensor where all have one shape.
        targets: of these; one tensor where they are tensors of one shape.
        problems: place of a bad sample -> what is wrong with it.
    """

    places: list[int]
    inputs: Tensor | list[Tensor]
    targets: Tensor | list[Any]
    problems: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> "_Part":
        """Called by the loader where batches go to a GPU."""
        inputs, targets = self.inputs, self.targets
        pinned = inputs.pin_memory() if isinstance(inputs, Tensor) else [each.pin_memory() for each in inputs]
        pinned_targets = targets.pin_memory() if isinstance(targets, Tensor) else targets
        return _Part(self.places, pinned, pinned_targets, self.problems)


class _Parts(IterableDataset[Any]):
    """What each worker reads: for every batch one part, be it empty, so that parts of one batch come in turn."""

    def __init__(self, dataset: AnySet, batches: Iterable[Dealt], collate: Collate) -> None:
        self._dataset, self._batches, self._collate = dataset, batches, collate

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        part, num_parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for epoch, batches in groupby(self._batches, key=lambda dealt: dealt.epoch):
            yield from self._read_epoch(epoch, [dealt.indices for dealt in batches], part, num_parts)

    def _read_epoch(self, epoch: int | None, batches: list[list[int]], part: int, num_parts: int) -> Iterator[Any]:
        dataset, indices = self._dataset, [index for batch in batches for index in batch]
        if isinstance(dataset, StreamedSet):
            owners: Sequence[int] = dataset.parts(epoch, indices, num_parts)
            mine = [index for index, owner in zip(indices, owners, strict=True) if owner == part]
            items = iter(dataset.stream(epoch, mine))
        else:
            owners = [place % num_parts for place in range(len(indices))]
            items = (self._item(epoch, index) for index in indices[part::num_parts])
        owner = iter(owners)
        for batch in batches:
            places = [place for place, of in enumerate(islice(owner, len(batch))) if of == part]
            yield self._collate(places, self._accepted(islice(items, len(places))), dataset)

    def _accepted(self, items: Iterable[Item | BadSampleError]) -> list[Item | BadSampleError]:
        """All of them.

        Raises:
            BadSampleError: one is bad, and the data set does not leave it out.
        """
        accepted = []
        for item in items:
            if isinstance(item, BadSampleError) and not leaves_out_bad(self._dataset):
                # At once: the next may take minutes, if they come from the same server.
                raise item
            accepted.append(item)
        return accepted

    def _item(self, epoch: int | None, index: int) -> Item | BadSampleError:
        if not isinstance(self._dataset, SampleSet):
            item: Item = self._dataset[index]  # type: ignore[index]  # torch's map-style data sets have it
            return item
        try:
            return self._dataset.item(epoch, index)
        except BadSampleError as error:
            return error


def _collate(places: list[int], items: list[Item | BadSampleError], dataset: AnySet) -> _Part:
    """Put the good samples together."""
    good: list[Item] = []
    problems: dict[int, str] = {}
    for place, item in zip(places, items, strict=True):
        if isinstance(item, BadSampleError):
            problems[place] = str(item)
        else:
            good.append(item)
    inputs, targets = ([item[part] for item in good] for part in (0, 1))
    return _Part([place for place in places if place not in problems], _stacked(inputs), _stacked(targets), problems)


def _stacked(values: list[Any]) -> Tensor | list[Any]:
    """One tensor where these are tensors of one shape; in a worker it is stacked into memory that the rank can see.

    Each such tensor costs a file descriptor, which is sent over a socket; so numbers stay numbers.
    """
    shapes = {each.shape if isinstance(each, Tensor) else None for each in values}
    return default_collate(values) if len(shapes) == 1 and None not in shapes else values


def _keep(places: list[int], items: list[Item | BadSampleError], dataset: AnySet) -> list[Item | BadSampleError]:
    """The samples as they are."""
    return items


def _start(loader: "DataLoader[Any]") -> Iterator[Any]:
    """What a loader reads; its workers are deaf to signals from their first moment, in which torch lets them die."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OUTLIVED)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:
    """Leave signals to the rank, which has steps to do after one. SLURM and terminals send them to every process.

    A worker ends by its rank's SIGTERM alone, which is how Python ends it when the rank ends; or when the rank is gone.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _OUTLIVED)
    Thread(target=_await_rank_s_end, daemon=True).start()


def _await_rank_s_end() -> None:
    rank = parent_process()
    assert rank is not None, "workers are processes that the rank has started"
    while os.getppid() == rank.pid:
        # Handlers would not be told who sent it. A rank that is killed sends nothing.
        received = signal.sigtimedwait(_OUTLIVED, _ORPHAN_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == rank.pid:
            break
    _end_with_children()


def _end_with_children() -> NoReturn:
    # A command that waits for its server would wait on, with nobody to read from it.
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(0)


def _as_is(part: Any) -> Any:
    return part


def _assemble(dataset: AnySet, dealt: Dealt, parts: list[_Part], device: torch.device, skipped: Skipped) -> Batch:
    """One batch from what the workers have read of it."""
    weights = list(dealt.weights)
    for part in parts:
        for place, problem in part.problems.items():
            skipped.add(dealt.indices[place], problem)
            weights[place] = 0.0
    read_parts = [part for part in parts if part.places] or [_blank_part(dataset)]
    inputs = [image for part in read_parts for image in _moved(part.inputs, device)]
    targets = [target for part in read_parts for target in _moved(part.targets, device)]
    rows = {place: row for row, place in enumerate(place for part in read_parts for place in part.places)}
    # A bad sample is replaced by any good one, without weight: so mixing images never mixes in nothing.
    places = [place if place in rows else read_parts[0].places[0] for place in range(len(dealt.indices))]
    order = [rows[place] for place in places]
    return Batch(
        # In one go, as it was stored: finished images are larger, and would be copied once more to be put in order.
        inputs=_finish(dataset, dealt, [inputs[row] for row in order], places),
        targets=default_collate([targets[row] for row in order]).to(device, non_blocking=True),
        weights=torch.tensor(weights, device=device),
        num_global=dealt.num_global,
        samples=dealt.indices,
    )


def _moved(samples: Tensor | list[Any], device: torch.device) -> Sequence[Any]:
    """One by one, on the device; numbers stay what they are."""
    if isinstance(samples, Tensor):
        return samples.to(device, non_blocking=True).unbind()
    return [each.to(device, non_blocking=True) if isinstance(each, Tensor) else each for each in samples]


def _finish(dataset: AnySet, dealt: Dealt, inputs: list[Tensor], places: list[int]) -> Tensor:
    if isinstance(dataset, SampleSet | StreamedSet):
        return dataset.finish(inputs, dealt.epoch, [dealt.indices[place] for place in places])
    return torch.stack(inputs)


def _blank_part(dataset: AnySet) -> _Part:
    """Where no sample of the rank's part is good."""
    assert isinstance(dataset, SampleSet | StreamedSet), "others leave nothing out"
    image, target = dataset.blank()
    return _Part([0], [image], [target])
