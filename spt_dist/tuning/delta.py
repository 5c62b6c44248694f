"""Task files: what was trained, the plan, and which backbone it belongs to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.files import load_tensors, save_tensors
from spt_dist.models.fingerprint import fingerprint
from spt_dist.models.matrices import head_buffers, logical_name
from spt_dist.models.twins import make_twin
from spt_dist.models.wrappers import unwrap
from spt_dist.sensitivity.shards import get_rank, world_size
from spt_dist.tuning.inject import install, is_tuned, make_modules, trainable_parameters, trained_tensors

FORMAT_VERSION = 2
# Version 1 had no originals, and another name for structured modules.
READABLE_VERSIONS = (1, FORMAT_VERSION)
_STATE_PREFIX = "state/"
_ORIGINAL_PREFIX = "original/"


def save_delta(tuned: nn.Module, path: str | Path) -> None:
    """Write the trained parameters, the plan and the backbone's fingerprint to a safetensors file.

    With several ranks a collective call: rank 0 writes, and the file is there for all when the call returns. The
    parameters have to be whole (they are under DDP and ZeRO 0 to 2). What is put around the model or its parts (DDP,
    ``torch.compile``, activation checkpointing) leaves no trace in the file.

    Raises:
        UserError: the model has not been injected; or other parameters of it are trained than its plan says.
    """
    tuned = unwrap(tuned)
    if not is_tuned(tuned):
        raise UserError("save_delta: this model has no tuning modules; call inject first")
    if get_rank() == 0:
        save_tensors(path, *describe_delta(tuned, trained_values(tuned)))
    if world_size() > 1:
        dist.barrier()


def trained_values(tuned: nn.Module) -> dict[str, Tensor]:
    """Name -> value of every trained parameter and the head's buffers, whatever is put around parts of the model.

    Raises:
        UserError: these are not what the model's plan trains.
    """
    plan = tuned.spt_plan
    assert isinstance(plan, Plan)
    state: dict[str, Tensor] = {logical_name(name): parameter for name, parameter in trainable_parameters(tuned)}
    frozen = [name for name in (*plan.head, *plan.parameters) if name not in state]
    trained = sum(value.numel() for name, value in state.items() if name not in plan.head)
    if frozen or trained != plan.num_trainable:
        found = f"{frozen[0]} is frozen" if frozen else f"{trained:,} parameters outside the head are trained"
        raise UserError(
            f"{found}, but the plan trains {plan.num_trainable:,} parameters and the head; requires_grad was changed "
            "after inject, so that no task file can hold what was trained"
        )
    return state | {logical_name(name): buffer for name, buffer in head_buffers(tuned).items() if plan.head}


def describe_delta(tuned: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a task file for ``tuned`` with the trained values ``state``."""
    plan = tuned.spt_plan
    assert isinstance(plan, Plan)
    plan_tensors, plan_metadata = plan.to_tensors()
    originals = tuned.spt_originals
    assert isinstance(originals, dict)
    tensors = plan_tensors | {_STATE_PREFIX + name: value for name, value in state.items()}
    tensors |= {_ORIGINAL_PREFIX + name: value for name, value in originals.items()}
    metadata = {
        "kind": "delta",
        "version": FORMAT_VERSION,
        "plan": plan_metadata,
        "fingerprint": tuned.spt_fingerprint,
        "backbone": backbone_name(tuned),
        "torch": torch.__version__,
    }
    return tensors, metadata


@dataclass(frozen=True)
class TaskFile:
    """A task file in memory.

    Attributes:
        plan: what is tuned.
        state: name in the tuned model -> trained value, the head's included.
        originals: name -> value before training of what was trained in place, outside the head.
        fingerprint, backbone: of the backbone it was made for, and the architecture's name.
        path: where it was read.
    """

    plan: Plan
    state: dict[str, Tensor]
    originals: dict[str, Tensor]
    fingerprint: str
    backbone: str
    path: Path

    def check_backbone(self, model: nn.Module) -> None:
        """Refuse another backbone than the task's.

        Raises:
            UserError: names both.
        """
        if is_tuned(model):
            raise UserError(f"{self.path}: the model has been injected already; load task files into a plain backbone")
        found = fingerprint(model)
        if found != self.fingerprint:
            raise UserError(
                f"{self.path}: made for backbone {self.backbone} ({self.fingerprint[:12]}), this is "
                f"{backbone_name(model)} with other weights ({found[:12]}); load the backbone it was trained on"
            )


def read_delta(path: str | Path) -> TaskFile:
    """Read a task file.

    Raises:
        UserError: the file is missing, damaged, of another kind or of a newer version.
    """
    return parse_delta(*load_tensors(path, "delta"), path)


def parse_delta(tensors: dict[str, Tensor], metadata: dict[str, Any], path: str | Path) -> TaskFile:
    """The inverse of ``describe_delta``; ``path`` names the file in errors.

    Raises:
        UserError: contents that do not fit together, or of a newer version.
    """
    if metadata.get("version") not in READABLE_VERSIONS:
        raise UserError(
            f"{path}: task file of version {metadata.get('version')}, this spt_dist reads up to {FORMAT_VERSION}"
        )
    plan = Plan.from_tensors(tensors, metadata["plan"], path)
    state, originals = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (_STATE_PREFIX, _ORIGINAL_PREFIX)
    )
    if metadata["version"] == 1:
        state = {name.replace(".low_rank.", ".structured."): value for name, value in state.items()}
    return TaskFile(plan, state, originals, metadata["fingerprint"], metadata["backbone"], Path(path))


def load_delta(backbone: nn.Module, path: str | Path) -> nn.Module:
    """Inject a task file's plan into the backbone it was made for and load what was trained, in place.

    The head is replaced by the task's where the number of classes differs (timm models).

    Returns:
        ``backbone``, tuned.

    Raises:
        UserError: the file is missing or damaged; or the backbone is another one.
    """
    task = read_delta(path)
    task.check_backbone(backbone)
    return attach_delta(backbone, task)


def attach_delta(backbone: nn.Module, task: TaskFile) -> nn.Module:
    """As ``load_delta``, from a file in memory and without comparing fingerprints: the model gets the task's."""
    _check_fits(backbone, task)
    fit_head(backbone, task.plan, task.state)
    modules = make_modules(backbone, task.plan)
    trained = trained_tensors(backbone, task.plan, modules)
    install(backbone, task.plan, modules, task.fingerprint)
    for name, parameter in trained.items():
        parameter.data.copy_(task.state[name])
    return backbone


def backbone_name(model: nn.Module) -> str:
    """timm's name of the architecture, or the class's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def _check_fits(backbone: nn.Module, task: TaskFile) -> None:
    """Refuse trained values that are not the model's by name and shape, before anything of it is changed."""
    twin = make_twin(backbone)
    fit_head(twin, task.plan, task.state)
    check_state(task.state, trained_tensors(twin, task.plan, make_modules(twin, task.plan)), task.path)


def check_state(state: dict[str, Tensor], trained: dict[str, Tensor], source: str | Path) -> None:
    """Refuse trained values that are not the model's by name and shape.

    Raises:
        UserError: names the first that differs.
    """
    if trained.keys() != state.keys():
        differing = sorted(trained.keys() ^ state.keys())
        raise UserError(f"{source}: its trained parameters differ from the model's (first: {differing[0]})")
    for name, parameter in trained.items():
        if parameter.shape != state[name].shape:
            raise UserError(f"{source}: {name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")


def fit_head(backbone: nn.Module, plan: Plan, state: dict[str, Tensor]) -> None:
    """Give the backbone a head with the task's number of classes, if it has another or none."""
    reset_classifier = getattr(backbone, "reset_classifier", None)
    wanted = [name for name in plan.head if name.endswith("weight") and name in state]
    if not wanted or not callable(reset_classifier):
        return
    own = dict(backbone.named_parameters())
    if any(name not in own or len(own[name]) != len(state[name]) for name in wanted):
        device = next(backbone.parameters()).device
        reset_classifier(len(state[wanted[-1]]))
        backbone.to(device)
