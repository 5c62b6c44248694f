"""The tasks that a config may name under ``data.type``."""

from collections.abc import Callable
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
from spt_dist.errors import UserError

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


def build_task(options: dict[str, Any], num_classes: int) -> Task:
    """Build the task of a config's ``data`` section.

    Raises:
        UserError: an unknown type or key; or the model has another number of classes.
    """
    arguments = {key: value for key, value in options.items() if key != "type"}
    build = lookup("data.type", options["type"], TASKS)
    check_arguments(build, arguments, "data")
    task: Task = build(**arguments)
    if num_classes != task.num_classes:
        raise UserError(
            f"config: model.num_classes={num_classes}, but data.type={options['type']!r} has {task.num_classes}"
        )
    return task
