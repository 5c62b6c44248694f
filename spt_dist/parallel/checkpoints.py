"""Checkpoints: what changes in a run and nothing else, in one file that any engine can load.

``WORK_DIR/checkpoints/step-00000120.safetensors`` holds the trained parameters and their moments, the plan, and the
fingerprint of the backbone. ``latest`` names the last complete one: it is written after the file it names.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.files import load_tensors, save_tensors, write_text

# Version 1 had another name for structured modules.
FORMAT_VERSION = 2
_STATE_PREFIX = "engine/"


@dataclass(frozen=True)
class SampleOrder:
    """What the order of the samples hangs on: a run can only be resumed with the same.

    Attributes:
        seed: of the run.
        batch_size: samples in a step over all ranks.
        num_train: training samples.
    """

    seed: int
    batch_size: int
    num_train: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        state: from ``Engine.gather_state``.
        plan: the plan of the run.
        fingerprint: of the untouched backbone.
        num_steps: optimizer steps done.
        order: of the samples.
        path: the file.
    """

    state: dict[str, Tensor]
    plan: Plan
    fingerprint: str
    num_steps: int
    order: SampleOrder
    path: Path

    def check_order(self, order: SampleOrder) -> None:
        """Refuse to go on with the samples in another order.

        Raises:
            UserError: names what differs.
        """
        mine, other = asdict(self.order), asdict(order)
        for name, value in mine.items():
            if value != other[name]:
                raise UserError(
                    f"{self.path}: written by a run with {name}={value}, this one has {name}={other[name]}; "
                    "resume with the same, or start a new run without --resume"
                )


def save_checkpoint(
    directory: Path, state: dict[str, Tensor], tuned: nn.Module, num_steps: int, order: SampleOrder, keep: int
) -> Path:
    """Write a checkpoint, point ``latest`` at it and delete all but the last ``keep``. On rank 0 only.

    Args:
        directory: where the run keeps its checkpoints.
        state: from ``Engine.gather_state``.
        tuned: the injected model, for its plan and fingerprint.
        num_steps: optimizer steps done.
        order: of the samples.
        keep: how many checkpoints stay.
    """
    plan = tuned.spt_plan
    assert isinstance(plan, Plan)
    plan_tensors, plan_metadata = plan.to_tensors()
    metadata: dict[str, Any] = {
        "kind": "checkpoint",
        "version": FORMAT_VERSION,
        "plan": plan_metadata,
        "fingerprint": tuned.spt_fingerprint,
        "num_steps": num_steps,
        "order": asdict(order),
    }
    tensors = plan_tensors | {_STATE_PREFIX + name: value for name, value in state.items()}
    path = save_tensors(directory / f"step-{num_steps:08d}.safetensors", tensors, metadata)
    write_text(directory / "latest", path.name)
    for old in sorted(directory.glob("step-*.safetensors"))[:-keep]:
        if old != path:
            old.unlink()
    return path


def find_checkpoint(resume: str, directory: Path) -> Path | None:
    """The file that ``--resume`` means: "auto" is the latest in ``directory``, or ``None`` if there is none.

    Raises:
        UserError: a path that does not exist, or a ``latest`` that points nowhere.
    """
    if resume != "auto":
        path = Path(resume)
        if not path.is_file():
            raise UserError(f"--resume {resume}: no such checkpoint file")
        return path
    pointer = directory / "latest"
    if not pointer.is_file():
        return None
    path = directory / pointer.read_text(encoding="utf-8").strip()
    if not path.is_file():
        raise UserError(f"{pointer}: names {path.name}, which does not exist; give --resume a checkpoint file")
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: the file is truncated, of another kind or version.
    """
    tensors, metadata = load_tensors(path, "checkpoint")
    if metadata.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint of version {metadata.get('version')}, this spt_dist reads {FORMAT_VERSION}"
        )
    state = {
        name.removeprefix(_STATE_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_STATE_PREFIX)
    }
    plan = Plan.from_tensors(tensors, metadata["plan"], path)
    order = SampleOrder(**metadata["order"])
    return Checkpoint(state, plan, metadata["fingerprint"], metadata["num_steps"], order, path)
