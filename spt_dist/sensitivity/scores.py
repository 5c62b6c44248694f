"""The result of stage 1, in memory and on disk."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spt_dist.errors import UserError
from spt_dist.files import save_tensors, write_text
from spt_dist.hosts import rank_zeros_file, who_sees
from spt_dist.ranks import from_all_ranks
from spt_dist.sensitivity.shards import (
    FlatIndex,
    ScoreShard,
    all_sum,
    collective_device,
    get_rank,
    shard_bounds,
    world_size,
)

INDEX_FILE = "scores.json"
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ScoreInfo:
    """What the scores were made from, saved with them.

    Attributes:
        criterion: "per_sample" or "batch".
        loss_reduction: what the scores refer to, whatever the reduction of the loss function that was passed: "sum"
            (each sample's own loss, "per_sample") or "mean" (over each batch, "batch").
        num_samples: samples in all, over every rank.
        train_mode: whether dropout and drop-path were active.
        head: parameters of the head: always trained, never scored nor counted.
        always_tuned: shapes of the backbone parameters that are trained and counted whatever the scores.
        skipped: backbone parameters that have no rule, ``name -> reason``.
        matrices: the scored weights that can take a structured module.
        backbone_size: number of weights outside the head.
        sample_ids: which samples were used, where the caller told.
    """

    criterion: str
    loss_reduction: str
    num_samples: int
    train_mode: bool
    head: list[str]
    always_tuned: dict[str, list[int]]
    skipped: dict[str, str]
    matrices: list[str]
    backbone_size: int
    sample_ids: list[int] | None = field(default=None)


class Scores:
    """Sensitivity of every eligible weight; each rank holds an equal part.

    ``scores[name]`` is the fp32 tensor in the parameter's shape, the same on every rank; with several ranks it is
    a collective call. A score is a sum over samples of squared gradients of that sample's own loss.
    """

    def __init__(self, shard: ScoreShard, info: ScoreInfo) -> None:
        self.shard = shard
        self.info = info

    @property
    def names(self) -> tuple[str, ...]:
        """Logical names of the scored parameters, in the order of the flat index space."""
        return self.shard.index.names

    @property
    def selectable(self) -> list[str]:
        """Those of ``names`` that selection chooses from: what is tuned in any case takes no part."""
        return [name for name in self.names if name not in self.info.always_tuned]

    @property
    def num_samples(self) -> int:
        """Samples that were scored, over all ranks."""
        return self.info.num_samples

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shard.index.position:
            raise KeyError(f"{name}: not scored; scores.names lists what is")
        return self.shard.gather(name)

    def check_finite(self) -> None:
        """Raise if a score is NaN or infinite, on every rank alike.

        Raises:
            UserError: names the first parameter concerned.
        """
        highest = torch.zeros(len(self.names), device=self.shard.values.device)
        for place, part, _ in self.shard.segments():
            highest[place] = self.shard.values[part].amax()
        bad = all_sum((~highest.isfinite()).int()).nonzero()
        if len(bad):
            raise UserError(
                f"{self.names[int(bad[0])]}: the sum over samples and ranks is NaN or infinite; make the loss smaller"
            )

    def save(self, directory: str | Path) -> None:
        """Write one safetensors file a rank and ``scores.json``, which names them. Collective.

        The index is written last, so that it never points at an incomplete set. Ranks on hosts that don't see rank 0's
        folder send it their part.
        """
        directory = Path(directory)
        # A name of its own for each save: a save that dies half-way leaves the previous set untouched.
        label = from_all_ranks(uuid4().hex[:8])[0]
        files = [f"scores-{label}-{rank:05d}-of-{world_size():05d}.safetensors" for rank in range(world_size())]
        for rank, sees in enumerate(who_sees(directory)):
            values = self.shard.values if sees else self._sent_by(rank)
            if get_rank() == (rank if sees else 0):
                save_tensors(directory / files[rank], {"scores": values}, {"kind": "scores"})
        from_all_ranks(None)
        if get_rank() == 0:
            index = self.shard.index
            text = {
                "kind": "scores",
                "version": FORMAT_VERSION,
                "names": index.names,
                "shapes": index.shapes,
                "files": files,
                "info": asdict(self.info),
            }
            write_text(directory / INDEX_FILE, json.dumps(text))
            for stale in set(directory.glob("scores-*.safetensors")) - {directory / file for file in files}:
                stale.unlink()
        from_all_ranks(None)

    def _sent_by(self, rank: int) -> Tensor:
        """The values of a rank, on rank 0; on that rank and on others something else."""
        values = self.shard.values
        if get_rank() == rank:
            dist.send(values, 0)
        elif get_rank() == 0:
            start, stop = shard_bounds(self.shard.index.total, world_size(), rank)
            values = torch.empty(stop - start, dtype=values.dtype, device=values.device)
            dist.recv(values, rank)
        return values

    @classmethod
    def load(cls, directory: str | Path) -> "Scores":
        """Read scores that any number of ranks saved; each rank reads its own part only. Collective.

        Hosts that don't see rank 0's files are sent them.

        Raises:
            UserError: a file is missing, truncated or does not fit the index.
        """
        path = Path(directory) / INDEX_FILE
        with rank_zeros_file(path) as local:
            saved = _read_index(local)
        index = FlatIndex(tuple(saved["names"]), tuple(tuple(shape) for shape in saved["shapes"]))
        start, stop = shard_bounds(index.total, world_size(), get_rank())
        files = [path.with_name(file) for file in saved["files"]]
        parts = []
        for number, file in enumerate(files):
            low, high = shard_bounds(index.total, len(files), number)
            first, last = max(low, start), min(high, stop)
            with rank_zeros_file(file) as local:
                if first < last:
                    parts.append(_read_part(local, high - low, first - low, last - low))
        values = torch.cat(parts) if parts else torch.zeros(0)
        return cls(ScoreShard(index, start, values.to(collective_device())), ScoreInfo(**saved["info"]))


def _read_index(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give a folder written by launch/sensitivity.py or Scores.save"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a score index ({error})") from error
    if not isinstance(saved, dict) or saved.get("kind") != "scores" or saved.get("version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a score index of version {FORMAT_VERSION}")
    return saved


def _read_part(file: Path, length: int, first: int, last: int) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            stored = opened.get_slice("scores")
            if stored.get_shape() != [length]:
                raise UserError(f"{file}: holds {stored.get_shape()} scores, its index says {length}")
            return stored[first:last]
    except FileNotFoundError:
        raise UserError(f"{file}: this shard of the scores is missing") from None
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable shard of scores ({error}); it may be truncated") from error
