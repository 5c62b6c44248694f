"""Checkpoints: what changes in a run and nothing else, in one file that any engine can load.

``WORK_DIR/checkpoints/step-00000120.safetensors`` holds the trained parameters and their moments, the plan, and the
fingerprint of the backbone. ``latest`` names the last complete one, ``best`` the one that was best at its evaluation:
both are written after the file they name.
"""

import json
import logging
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.files import TensorFile, save_tensors, write_text
from spt_dist.hosts import rank_zeros_file
from spt_dist.ranks import from_all_ranks, from_rank_0

# Version 1 had another name for structured modules; 2 did not say which run it was of.
FORMAT_VERSION = 4
_STATE_PREFIX = "engine/"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunIdentity:
    """What a run has to have in common with the one that it goes on with.

    Attributes:
        seed: of the run.
        batch_size: samples in a step over all ranks.
        num_train: training samples.
        data: the config's section.
        model: architecture and number of classes.
        method: the config's section.
        schedule: what else the loss curve depends on; another one is taken, with a warning.
    """

    seed: int
    batch_size: int
    num_train: int
    data: dict[str, Any]
    model: dict[str, Any]
    method: dict[str, Any]
    schedule: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        num_steps: optimizer steps done.
        best_score: highest value of the main metric (top-1, mIoU) in an evaluation, if there was one.
        best_step: the steps before that evaluation.
    """

    num_steps: int = 0
    best_score: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        state: from ``Engine.gather_state`` and the trainer; a tensor is read when it is asked for.
        plan: the plan of the run.
        fingerprint: of the untouched backbone.
        progress: how far the run was.
        identity: of the run.
        path: the file.
    """

    state: Mapping[str, Tensor]
    plan: Plan
    fingerprint: str
    progress: Progress
    identity: RunIdentity
    path: Path

    def check_backbone(self, fingerprint: str) -> None:
        """Refuse another backbone.

        Raises:
            UserError: its fingerprint is another.
        """
        if self.fingerprint != fingerprint:
            raise UserError(f"{self.path}: belongs to a backbone with other weights; check model.checkpoint")

    def check(self, identity: RunIdentity) -> None:
        """Refuse to go on with another run's checkpoint, and warn of another schedule.

        Raises:
            UserError: names what differs.
        """
        # Through JSON, as the one in the file went, which makes lists of a config's tuples.
        mine, other = asdict(self.identity), json.loads(json.dumps(asdict(identity)))
        mine_schedule, other_schedule = mine.pop("schedule"), other.pop("schedule")
        for key, (old, new) in _differences(mine, other).items():
            raise UserError(
                f"{self.path}: written by a run with {key}={old!r}, this one has {key}={new!r}; "
                "resume with the same, or start a new run without --resume"
            )
        for key, (old, new) in _differences(mine_schedule, other_schedule).items():
            logger.warning("%s was written with %s=%r; going on with %r", self.path, key, old, new)


def save_checkpoint(
    directory: Path,
    state: Mapping[str, Tensor],
    tuned: nn.Module,
    progress: Progress,
    identity: RunIdentity,
    keep: int,
) -> Path:
    """Write a checkpoint, point ``latest`` at it, and delete all but the last ``keep`` and the best. On rank 0 only.

    Args:
        directory: where the run keeps its checkpoints.
        state: from ``Engine.gather_state``.
        tuned: the injected model, for its plan and fingerprint.
        progress: how far the run is.
        identity: of the run.
        keep: how many checkpoints stay.

    Raises:
        OSError: from the file system; what was there before is still there.
    """
    plan = tuned.spt_plan
    assert isinstance(plan, Plan)
    plan_tensors, plan_metadata = plan.to_tensors()
    metadata: dict[str, Any] = {
        "kind": "checkpoint",
        "version": FORMAT_VERSION,
        "plan": plan_metadata,
        "fingerprint": tuned.spt_fingerprint,
        "progress": asdict(progress),
        "identity": asdict(identity),
    }
    tensors = plan_tensors | {_STATE_PREFIX + name: value for name, value in state.items()}
    path = save_tensors(directory / f"step-{progress.num_steps:08d}.safetensors", tensors, metadata)
    write_text(directory / "latest", path.name)
    _delete_old(directory, keep)
    return path


def mark_best(directory: Path, path: Path) -> None:
    """Point ``best`` at a checkpoint, which is then kept. On rank 0 only."""
    write_text(directory / "best", path.name)


def find_checkpoint(resume: str | None, directory: Path) -> Checkpoint | None:
    """Open the checkpoint that ``--resume`` means, the same on every rank. Collective.

    "auto" is the latest in ``directory``, or ``None`` if there is none. Where it is damaged, the one before it is
    taken, with a warning.

    Hosts that don't see the file of rank 0 are sent it.

    Raises:
        UserError: a path that does not exist, or is damaged; or "auto", and all there are are damaged, or another host
            than rank 0's has later ones.
    """
    if resume is None:
        return None
    found = from_rank_0(
        lambda: _find_latest(directory) if resume == "auto" else _check_file(Path(resume), f"--resume {resume}")
    )
    if resume == "auto":
        _check_other_hosts(directory)
    if found is None:
        return None
    with rank_zeros_file(found) as path:
        return replace(load_checkpoint(path), path=found)


def _check_other_hosts(directory: Path) -> None:
    """Refuse to leave behind what lies on another host, where rank 0 was before. Collective."""
    pointed = from_all_ranks((socket.gethostname(), _pointed_step(directory)))
    for host, step in pointed:
        if step > pointed[0][1]:
            raise UserError(
                f"{directory}: on {host} it has a checkpoint of step {step}, but on {pointed[0][0]}, where rank 0 is, "
                f"{f'the latest is of step {pointed[0][1]}' if pointed[0][1] else 'none'}; copy the folder there, "
                "or delete it where it is not wanted"
            )


def _pointed_step(directory: Path) -> int:
    """Steps before the checkpoint that ``latest`` names; 0 where there is none."""
    pointer = directory / "latest"
    named = _NAME.fullmatch(pointer.read_text(encoding="utf-8").strip()) if pointer.is_file() else None
    return int(named[1]) if named else 0


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint.

    Raises:
        UserError: the file is missing, truncated, of another kind or version, or under another's name.
    """
    file = TensorFile(path, "checkpoint")
    metadata = file.metadata
    if metadata.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint of version {metadata.get('version')}, this spt_dist reads {FORMAT_VERSION}"
        )
    if not file.has_checksums:
        raise UserError(f"{path}: has no checksums; the file is damaged, take another one")
    progress = Progress(**metadata["progress"])
    named = _NAME.fullmatch(path.name)
    if named is not None and int(named[1]) != progress.num_steps:
        raise UserError(f"{path}: holds the state after {progress.num_steps} steps; it was swapped for another file")
    plan_tensors = {name: file[name] for name in file if not name.startswith(_STATE_PREFIX)}
    return Checkpoint(
        state=_State(file),
        plan=Plan.from_tensors(plan_tensors, metadata["plan"], path),
        fingerprint=metadata["fingerprint"],
        progress=progress,
        identity=RunIdentity(**metadata["identity"]),
        path=path,
    )


class _State(Mapping[str, Tensor]):
    """The part of a checkpoint that engines know."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        return self._file[_STATE_PREFIX + name]

    def __iter__(self) -> Any:
        return (name.removeprefix(_STATE_PREFIX) for name in self._file if name.startswith(_STATE_PREFIX))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _find_latest(directory: Path) -> Path | None:
    pointer = directory / "latest"
    candidates = sorted(directory.glob("step-*.safetensors"), reverse=True)
    if pointer.is_file():
        named = directory / pointer.read_text(encoding="utf-8").strip()
        # What is later than the latest is of a run that was gone back on.
        candidates = [named, *(path for path in candidates if path.name < named.name)]
    if not candidates:
        return None
    first: UserError | None = None
    for path in candidates:
        try:
            return _check_file(path, str(pointer))
        except UserError as error:
            logger.warning("%s; trying the checkpoint before it", error)
            first = first or error
    raise UserError(f"{first}; no other checkpoint in {directory} is whole: start a new run without --resume")


def _check_file(path: Path, named_by: str) -> Path:
    """The path of a file that can be read to its end."""
    if not path.is_file():
        raise UserError(f"{named_by}: there is no checkpoint file {path}")
    for _ in load_checkpoint(path).state.values():
        pass
    return path


def drop_later(directory: Path, num_steps: int) -> None:
    """Delete the checkpoints that come after ``num_steps`` steps, for the run goes on from there. On rank 0 only."""
    pointer = directory / "best"
    for path in sorted(directory.glob("step-*.safetensors")):
        named = _NAME.fullmatch(path.name)
        if named is not None and int(named[1]) > num_steps:
            path.unlink()
            if pointer.is_file() and pointer.read_text(encoding="utf-8") == path.name:
                pointer.unlink()


def _delete_old(directory: Path, keep: int) -> None:
    kept = {path.read_text(encoding="utf-8") for path in (directory / "best", directory / "latest") if path.is_file()}
    for old in sorted(directory.glob("step-*.safetensors"))[:-keep]:
        if old.name not in kept:
            old.unlink()
    # What a run left that was killed while it wrote a checkpoint or a pointer to one.
    for unfinished in directory.glob(".*"):
        unfinished.unlink()


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, of what differs between two nested dicts."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found[prefix + key] = (before, after)
    return found
