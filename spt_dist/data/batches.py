"""Dealing samples out to ranks so that a global batch does not depend on how many there are."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spt_dist.errors import UserError


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


@dataclass(frozen=True)
class GlobalBatches:
    """The order in which samples are visited: the same global batches for every number of ranks.

    Every rank gets equally many samples in each step; where a batch does not divide evenly, the last ranks get a
    repeated sample of weight 0, so that all ranks run the same number of passes of the same size.

    Attributes:
        num_samples: size of the data set.
        batch_size: samples in a global batch; the last of an epoch may be smaller.
        rank, world_size: which part is dealt.
        seed: of the shuffling, which differs from epoch to epoch; ``None`` for file order.
        only_full: leave out what is left of an epoch over its full batches.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int | None = None
    only_full: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch."""
        if self.only_full:
            return self.num_samples // self.batch_size
        return -(-self.num_samples // self.batch_size)

    def deal(self, epoch: int = 0, first_step: int = 0) -> Iterator[tuple[list[int], list[float], int]]:
        """This rank's ``(indices, weights, size of the global batch)`` for each step from ``first_step`` on."""
        order = list(range(self.num_samples))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        for step in range(first_step, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            mine = batch[self.rank :: self.world_size]
            padding = -(-len(batch) // self.world_size) - len(mine)
            yield mine + batch[:1] * padding, [1.0] * len(mine) + [0.0] * padding, len(batch)


def deal_samples(
    samples: list[int], batch_size: int, rank: int, world_size: int, same_batches: bool
) -> list[tuple[list[int], list[float], int]]:
    """This rank's batches for one pass over ``samples``, in the form that ``load_batches`` takes.

    Args:
        samples: indices in the data set.
        batch_size: most samples in a batch.
        rank, world_size: which part is dealt.
        same_batches: for every number of ranks make the same batches, in the order of ``samples``, and deal them out
            whole; otherwise the samples are dealt out, which is more even, and each rank makes batches of its own.
    """
    share = samples if same_batches else samples[rank::world_size]
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    mine = batches[rank::world_size] if same_batches else batches
    return [(batch, [1.0] * len(batch), len(batch)) for batch in mine]


def read(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader yields; a mistake of the user's that one of its workers met is told as the rank itself would.

    Raises:
        UserError: a sample can't be read.
    """
    try:
        yield from loader
    except UserError as error:
        # torch raises a worker's error again with the worker's traceback as its text.
        _, found, text = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
        if not found:
            raise
        raise UserError(text.strip()) from error


def load_batches(
    dataset: Dataset[Any],
    batches: Iterable[tuple[list[int], list[float], int]],
    device: torch.device,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Read the samples of each batch.

    Args:
        dataset: an item is ``(input, target)``.
        batches: from ``GlobalBatches.deal`` or ``deal_samples``.
        device: where the tensors go.
        num_workers: processes that read them; 0 for this one.
    """
    dealt = list(batches)
    indices = [indices for indices, _, _ in dealt]
    loader = DataLoader(
        dataset, batch_sampler=indices, num_workers=num_workers, pin_memory=device.type == "cuda" and num_workers > 0
    )
    for (inputs, targets), (samples, weights, num_global) in zip(read(loader), dealt, strict=True):
        yield Batch(inputs.to(device), targets.to(device), torch.tensor(weights, device=device), num_global, samples)
