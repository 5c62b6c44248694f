"""Dealing samples out to ranks so that a global batch does not depend on how many there are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Order = Callable[[int | None], Tensor]
"""The order of an epoch; see ``StreamedSet.order``."""


@dataclass(frozen=True)
class Dealt:
    """This rank's part of one global batch, before it is read.

    Attributes:
        epoch: what the samples' randomness hangs on, see ``epoch_key``; ``None`` for none.
        indices: of the samples in the data set.
        weights: 1 for a sample, 0 for one that only fills up the rank's part.
        num_global: samples of the global batch, over all ranks.
    """

    epoch: int | None
    indices: list[int]
    weights: list[float]
    num_global: int


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
        order: of a data set that has a say in it; ``None`` for any order.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int | None = None
    only_full: bool = False
    order: Order | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch."""
        if self.only_full:
            return self.num_samples // self.batch_size
        return -(-self.num_samples // self.batch_size)

    def deal(self, epoch: int = 0, first_step: int = 0) -> Iterator[Dealt]:
        """This rank's part of each global batch of an epoch, from ``first_step`` on."""
        key = None if self.seed is None else epoch_key(self.seed, epoch)
        order = self._order(key)
        for step in range(first_step, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size].tolist()
            mine = batch[self.rank :: self.world_size]
            padding = -(-len(batch) // self.world_size) - len(mine)
            yield Dealt(key, mine + batch[:1] * padding, [1.0] * len(mine) + [0.0] * padding, len(batch))

    def steps(self, first: int, last: int) -> "Steps":
        """This rank's parts of a run's global batches ``first`` to ``last - 1``, epoch after epoch."""
        return Steps(self, first, last)

    def epoch(self) -> "Steps":
        """This rank's parts of the first epoch."""
        return Steps(self, 0, self.steps_per_epoch)

    def _order(self, key: int | None) -> Tensor:
        if self.order is not None:
            return self.order(key)
        if key is None:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(key))


@dataclass(frozen=True)
class Steps:
    """Some of the steps of a run over ``batches``; can be gone through many times, by many processes."""

    batches: GlobalBatches
    first: int
    last: int

    def __iter__(self) -> Iterator[Dealt]:
        per_epoch, step = self.batches.steps_per_epoch, self.first
        while step < self.last:
            for dealt in self.batches.deal(step // per_epoch, step % per_epoch):
                if step == self.last:
                    return
                yield dealt
                step += 1


def epoch_key(seed: int, epoch: int) -> int:
    """What shuffling and augmentation of an epoch hang on, in a run with ``seed``."""
    return seed * 1_000_003 + epoch


def deal_samples(
    samples: list[int], batch_size: int, rank: int, world_size: int, same_batches: bool, epoch: int | None = None
) -> list[Dealt]:
    """This rank's batches for one pass over ``samples``.

    Args:
        samples: indices in the data set.
        batch_size: most samples in a batch.
        rank, world_size: which part is dealt.
        same_batches: for every number of ranks make the same batches, in the order of ``samples``, and deal them out
            whole; otherwise the samples are dealt out, which is more even, and each rank makes batches of its own.
        epoch: what the samples' randomness hangs on.
    """
    bounds = [len(samples) * place // world_size for place in (rank, rank + 1)]
    # Neighbours stay together: they may lie in one shard.
    share = samples if same_batches else samples[bounds[0] : bounds[1]]
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    mine = batches[rank::world_size] if same_batches else batches
    return [Dealt(epoch, batch, [1.0] * len(batch), len(batch)) for batch in mine]
