"""The tasks that a config may name under ``data.type``."""

from collections.abc import Callable
from typing import Any

from spt_dist.config import check_arguments, lookup
from spt_dist.data.ade20k import build_ade20k
from spt_dist.data.digits import build_digits
from spt_dist.data.task import Task
from spt_dist.errors import UserError

TASKS: dict[str, Callable[..., Task]] = {"digits": build_digits, "ade20k": build_ade20k}


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
