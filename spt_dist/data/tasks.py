"""The tasks that a config may name under ``data.type``."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from spt_dist.config import check_arguments, lookup
from spt_dist.data.ade20k import build_ade20k
from spt_dist.data.digits import build_digits
from spt_dist.data.lists.fgvc import build_fgvc
from spt_dist.data.lists.hub import build_hub
from spt_dist.data.lists.image_folder import build_image_folder
from spt_dist.data.lists.vtab import build_vtab
from spt_dist.data.mini.tasks import build_mini
from spt_dist.data.shards.task import build_shards
from spt_dist.data.task import Task
from spt_dist.data.transforms import named_transform
from spt_dist.errors import UserError
from spt_dist.normalisation import Normalisation, read_normalisation

logger = logging.getLogger(__name__)

TASKS: dict[str, Callable[..., Task]] = {
    "digits": build_digits,
    "mini": build_mini,
    "vtab": build_vtab,
    "fgvc": build_fgvc,
    "image_folder": build_image_folder,
    "hub": build_hub,
    "shards": build_shards,
    "ade20k": build_ade20k,
}


def build_task(options: dict[str, Any], num_classes: int, normalize: str | dict[str, Any] | None = None) -> Task:
    """Build the task of a config's ``data`` section.

    Args:
        options: the section.
        num_classes: outputs of the model's head.
        normalize: how the backbone wants images normalised (``model.normalize``). ``data.normalize`` and transforms
            whose names stand for a normalisation take precedence; ``None`` leaves it to the transform.

    Raises:
        UserError: an unknown type or key; or the model has another number of classes.
    """
    build, arguments = _read_options(options)
    normalisation = choose_normalisation(options, normalize)
    if normalisation is not None:
        arguments["normalize"] = {"mean": normalisation.mean, "std": normalisation.std}
    task: Task = build(**arguments)
    if num_classes != task.num_classes:
        raise UserError(
            f"config: model.num_classes={num_classes}, but data.type={options['type']!r} has {task.num_classes}"
        )
    return replace(task, normalisation=normalisation)


def choose_normalisation(options: dict[str, Any], normalize: str | dict[str, Any] | None) -> Normalisation | None:
    """How a config's images are normalised. No data are looked at.

    Data's own, a transform's that stands for it, the backbone's, the transform's: the first that there is.

    Args:
        options: the config's ``data`` section.
        normalize: how the backbone wants images normalised (``model.normalize``).

    Returns:
        With its source; ``None`` for a task that does not let it be chosen.

    Raises:
        UserError: an unknown type or key, or no such normalisation.
    """
    build, arguments = _read_options(options)
    parameters = inspect.signature(build).parameters
    backbone = None if normalize is None else read_normalisation("model.normalize", normalize)
    if "normalize" not in parameters:
        if backbone is not None:
            kind = options["type"]
            logger.warning("data.type=%r normalises images its own way; the backbone wants %s", kind, backbone)
        return None
    name = arguments.get("transform", parameters["transform"].default)
    transform = named_transform(name)
    own = replace(transform.normalisation, source=f"data.transform={name!r}")
    if arguments.get("normalize") is not None:
        chosen = read_normalisation("data.normalize", arguments["normalize"])
    else:
        chosen = own if transform.is_whole or backbone is None else backbone
    if backbone is not None and (chosen.mean, chosen.std) != (backbone.mean, backbone.std):
        return replace(chosen, source=f"{chosen.source}; model.normalize is {backbone.name}")
    return chosen


def _read_options(options: dict[str, Any]) -> tuple[Callable[..., Task], dict[str, Any]]:
    """The function that builds a task, and its arguments."""
    build = lookup("data.type", options["type"], TASKS)
    arguments = {key: value for key, value in options.items() if key != "type"}
    check_arguments(build, arguments, "data")
    return build, arguments
