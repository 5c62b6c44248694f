"""Where NaN and infinity in the scores come from."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from spt_dist.errors import UserError
from spt_dist.sensitivity.nested import batch_size, take, tensors
from spt_dist.sensitivity.scoring import ScoringPass


class NotFiniteError(UserError):
    """A score came out NaN or infinite.

    Attributes:
        where: the layer, and what is wrong there.
        rank: whose sample it was.
        position: of the sample among that rank's, counted from 0.
    """

    def __init__(self, where: str, rank: int, position: int) -> None:
        super().__init__(where, rank, position)
        self.where, self.rank, self.position = where, rank, position

    def __str__(self) -> str:
        sample = f"sample {self.position} of rank {self.rank} (counted from 0 in the order of its batches)"
        return f"{self.where}, for {sample}"


def explain(scoring: ScoringPass, inputs: Any, targets: Any, rank: int, position: int, rounds: int) -> NotFiniteError:
    """Find the sample and the layer that a NaN or infinite score comes from, one sample at a time.

    Args:
        scoring: the pass.
        inputs, targets: the samples among which it is.
        rank: of this process.
        position: of their first among this rank's.
        rounds: how many passes to make; more than there are samples where other ranks have more.
    """
    num_samples = batch_size(inputs)
    found: NotFiniteError | None = None
    for number in range(rounds):
        sample = min(number, num_samples - 1)
        rows = slice(sample, sample + 1)
        where = _first_trouble(scoring, take(inputs, rows), take(targets, rows))
        if where is not None and found is None:
            found = NotFiniteError(where, rank, position + sample)
    if found is None:
        where = (
            f"a score is NaN or infinite, but not if samples are scored one by one; among {num_samples} from the next"
        )
        found = NotFiniteError(where, rank, position)
    return found


def _first_trouble(scoring: ScoringPass, inputs: Any, targets: Any) -> str | None:
    """Where one sample's numbers stop being finite: in its inputs, on the way forward or on the way back."""
    broken_outputs: list[str] = []
    broken_scores: list[str] = []

    def note_scores(name: str, scores: dict[str, Tensor]) -> None:
        if not all(_all_finite(scores.values())):
            broken_scores.append(name)

    with _outputs_watched(scoring.model, broken_outputs):
        loss = scoring.observe(inputs, targets, note_scores)
    if not all(_all_finite(tensors(inputs))):
        return "the inputs hold NaN or infinity"
    if broken_outputs:
        return f"{broken_outputs[0]}: its output is NaN or infinite"
    if not bool(loss.isfinite()):
        return "the loss is NaN or infinite, though every layer's output is finite"
    if broken_scores:
        return f"{broken_scores[0]}: its scores are NaN or infinite (in float16, try dtype=torch.bfloat16 or none)"
    return None


def _all_finite(values: Iterable[Tensor]) -> Iterator[bool]:
    return (bool(value.isfinite().all()) for value in values)


@contextmanager
def _outputs_watched(model: nn.Module, broken: list[str]) -> Iterator[None]:
    """Note the names of modules without children whose outputs are not finite, in the order of their calls."""

    def check(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not all(_all_finite(tensors(output))):
            broken.append(name)

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(partial(check, name)) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
