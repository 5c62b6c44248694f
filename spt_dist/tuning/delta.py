"""Task files: what was trained, the plan, and which backbone it belongs to."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spt_dist.allocation.plan import Plan
from spt_dist.errors import UserError
from spt_dist.files import load_tensors, save_tensors
from spt_dist.models.fingerprint import fingerprint
from spt_dist.sensitivity.shards import get_rank, world_size
from spt_dist.tuning.inject import install, is_tuned, make_modules, trainable_parameters, trained_parameters

FORMAT_VERSION = 1
_STATE_PREFIX = "state/"


def save_delta(tuned: nn.Module, path: str | Path) -> None:
    """Write the trained parameters, the plan and the backbone's fingerprint to a safetensors file.

    With several ranks a collective call: rank 0 writes, and the file is there for all when the call returns. The
    parameters have to be whole (they are under DDP and ZeRO 0 to 2).

    Raises:
        UserError: the model has not been injected.
    """
    if not is_tuned(tuned):
        raise UserError("save_delta: this model has no tuning modules; call inject first")
    if get_rank() == 0:
        save_tensors(path, *describe_delta(tuned, dict(trainable_parameters(tuned))))
    if world_size() > 1:
        dist.barrier()


def describe_delta(tuned: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a task file for ``tuned`` with the trained values ``state``."""
    plan = tuned.spt_plan
    assert isinstance(plan, Plan)
    plan_tensors, plan_metadata = plan.to_tensors()
    tensors = plan_tensors | {_STATE_PREFIX + name: value for name, value in state.items()}
    metadata = {
        "kind": "delta",
        "version": FORMAT_VERSION,
        "plan": plan_metadata,
        "fingerprint": tuned.spt_fingerprint,
        "backbone": backbone_name(tuned),
        "torch": torch.__version__,
    }
    return tensors, metadata


def load_delta(backbone: nn.Module, path: str | Path) -> nn.Module:
    """Inject a task file's plan into the backbone it was made for and load what was trained, in place.

    The head is replaced by the task's where the number of classes differs (timm models).

    Returns:
        ``backbone``, tuned.

    Raises:
        UserError: the file is missing or damaged; or the backbone is another one.
    """
    tensors, metadata = load_tensors(path, "delta")
    if metadata.get("version") != FORMAT_VERSION:
        raise UserError(f"{path}: task file of version {metadata.get('version')}, this spt_dist reads {FORMAT_VERSION}")
    if is_tuned(backbone):
        raise UserError(f"{path}: the model has been injected already; load task files into a plain backbone")
    found = fingerprint(backbone)
    if found != metadata["fingerprint"]:
        raise UserError(
            f"{path}: made for backbone {metadata['backbone']} ({metadata['fingerprint'][:12]}), this is "
            f"{backbone_name(backbone)} with other weights ({found[:12]}); load the backbone it was trained on"
        )
    plan = Plan.from_tensors(tensors, metadata["plan"], path)
    state = {
        name.removeprefix(_STATE_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_STATE_PREFIX)
    }
    _fit_head(backbone, plan, state)
    modules = make_modules(backbone, plan)
    trained = trained_parameters(backbone, plan, modules)
    _check_state(state, trained, path)
    install(backbone, plan, modules)
    for name, parameter in trained.items():
        parameter.data.copy_(state[name])
    return backbone


def backbone_name(model: nn.Module) -> str:
    """timm's name of the architecture, or the class's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def _check_state(state: dict[str, Tensor], trained: dict[str, nn.Parameter], source: str | Path) -> None:
    """Refuse trained values that are not the model's by name and shape."""
    if trained.keys() != state.keys():
        differing = sorted(trained.keys() ^ state.keys())
        raise UserError(f"{source}: its trained parameters differ from the model's (first: {differing[0]})")
    for name, parameter in trained.items():
        if parameter.shape != state[name].shape:
            raise UserError(f"{source}: {name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")


def _fit_head(backbone: nn.Module, plan: Plan, state: dict[str, Tensor]) -> None:
    """Give the backbone a head with the task's number of classes, if it has another or none."""
    reset_classifier = getattr(backbone, "reset_classifier", None)
    wanted = [name for name in plan.head if name.endswith("weight") and name in state]
    if not wanted or not callable(reset_classifier):
        return
    own = dict(backbone.named_parameters())
    if any(name not in own or len(own[name]) != len(state[name]) for name in wanted):
        reset_classifier(len(state[wanted[-1]]))
