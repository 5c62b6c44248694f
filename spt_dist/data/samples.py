"""What a set of samples is to the loader, and what a sample is before and after its preparation.

Shape suffixes: B samples, C channels, H height, W width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from spt_dist.errors import UserError

Item = tuple[Tensor, Any]
"""A sample as workers hand it over: what ``finish`` takes, and its target: an int, or a tensor."""


class BadSampleError(UserError):
    """A sample is not what it should be; the message says which (its file, or shard and key) and why."""


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored.

    Attributes:
        name: which it is, for errors: its file, or its shard and key.
        image: the content of an image file.
        target: a label, or the content of a mask's file.
    """

    name: str
    image: bytes
    target: int | bytes


class Preparation(Protocol):
    """How a stored sample becomes one to train on. Depends on nothing but its arguments; leaves random states alone."""

    def prepare(self, sample: RawSample, epoch: int | None, index: int) -> Item:
        """What a worker does.

        Args:
            sample: the content of its files.
            epoch: seeds what is random, with ``index``; ``None`` for the way in which held-out samples are seen.
            index: of the sample in its set.

        Raises:
            BadSampleError: it can't be decoded, or is too large.
        """

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """What is done where the model is: inputs of some samples to fp32 ``(B, C, H, W)``, on the inputs' device."""

    def blank(self) -> Item:
        """An item of the usual shape that takes the place of a bad sample; it gets no weight."""


class SampleSet(ABC):
    """Samples that the loader asks for one by one. Torch's own map-style data sets will do as well.

    Attributes:
        skip_bad: whether bad samples are left out, with a count, instead of ending the run.
        num_workers: processes of each rank that read samples, beside the rank's own; 0 for none.
    """

    skip_bad: bool = False
    num_workers: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    def warm_up(self, show_progress: bool = False) -> None:  # noqa: B027  # most have nothing to do
        """Read what has to be read before the first sample; may take long.

        Args:
            show_progress: whether to show a bar where it does.
        """

    @abstractmethod
    def item(self, epoch: int | None, index: int) -> Item:
        """One sample; ``epoch`` and ``index`` as for ``Preparation.prepare``.

        Raises:
            BadSampleError: it can't be read.
        """

    @abstractmethod
    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """As ``Preparation.finish``."""

    @abstractmethod
    def blank(self) -> Item:
        """As ``Preparation.blank``."""


class StreamedSet(ABC):
    """Samples that are best read one after another, in an order that the set has a say in.

    Attributes:
        skip_bad, num_workers: as of ``SampleSet``.
    """

    skip_bad: bool = False
    num_workers: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def order(self, epoch: int | None) -> Tensor:
        """The order in which an epoch visits the samples: int64 ``(len,)``, each index once; ``None``: not shuffled."""

    @abstractmethod
    def parts(self, epoch: int | None, indices: Sequence[int], num_parts: int) -> list[int]:
        """Which of ``num_parts`` workers reads each of a rank's samples, so that no two read much of the same."""

    @abstractmethod
    def stream(self, epoch: int | None, indices: Sequence[int]) -> Iterator[Item | BadSampleError]:
        """The samples ``indices``, in this order; for a bad one its error, as a value.

        Args:
            epoch: of ``order`` and of what is random in the preparation.
            indices: in an order in which ``order(epoch)`` has them, or ascending; one may come twice.
        """

    @abstractmethod
    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        """As ``Preparation.finish``."""

    @abstractmethod
    def blank(self) -> Item:
        """As ``Preparation.blank``."""
