"""The curves of a run: mmengine's visualisation backends (TensorBoard, W&B, MLflow, one's own), on rank 0 only."""

import importlib.util
import inspect
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spt_dist.compat import import_mmengine
from spt_dist.config import lookup
from spt_dist.errors import UserError
from spt_dist.sections import LogConfig, RunConfig

logger = logging.getLogger(__name__)

# Backend of mmengine -> the package it imports, only once it is used.
_PACKAGES = {
    "TensorboardVisBackend": "tensorboard",
    "WandbVisBackend": "wandb",
    "MLflowVisBackend": "mlflow",
    "ClearMLVisBackend": "clearml",
    "NeptuneVisBackend": "neptune",
    "DVCLiveVisBackend": "dvclive",
    "AimVisBackend": "aim",
}
# mmengine's backend for W&B passes no steps on, so that W&B would count calls instead.
_WANDB_STEP = "train/step"


def check_backends(log: LogConfig) -> None:
    """Refuse backends that could not be used, before anything is built.

    Raises:
        UserError: a backend is unknown, its package is not installed, or it does not take its arguments.
    """
    import_mmengine()
    from mmengine.registry import VISBACKENDS
    from mmengine.visualization import BaseVisBackend

    for index, options in enumerate(log.backends):
        where = f"log.backends[{index}]"
        if not isinstance(options, dict) or not isinstance(options.get("type"), str):
            raise UserError(f"config: {where}={options!r} has to be a dict with a type: dict(type='WandbVisBackend')")
        name = options["type"]
        backend = lookup(f"{where}.type", name, VISBACKENDS.module_dict)
        if not issubclass(backend, BaseVisBackend):
            raise UserError(f"config: {where}.type={name!r} has to be a subclass of mmengine's BaseVisBackend")
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"config: {where}: {name} needs the package {package}: pip install {package}")
        signature = inspect.signature(backend)
        try:
            signature.bind(**_arguments(options, Path()))
        except TypeError as error:
            known = ", ".join(signature.parameters)
            raise UserError(f"config: {where}: {name} {error}; its arguments are {known}") from error


class Curves:
    """Scalars against steps, to every backend of ``log.backends``.

    A backend that fails once training is under way is reported and left out from then on; the run does not end for it.
    """

    def __init__(self, config: RunConfig, num_steps: int) -> None:
        """Start the backends; those that write files do so in ``logs/`` below the work dir.

        Args:
            config: the run's, which the backends also get to show.
            num_steps: steps done already. Of an earlier, killed run TensorBoard shows the points up to there only.

        Raises:
            UserError: a backend can't be started.
        """
        self._backends = {}
        for index, options in enumerate(config.log.backends):
            where = f"log.backends[{index}]"
            try:
                self._backends[where] = _Backend(options, config, num_steps)
            # Each package has errors of its own: no account, no server, a wrong argument.
            except Exception as error:
                raise UserError(
                    f"config: {where}: {options['type']} can't be started ({_describe(error)}); "
                    "change its arguments or leave it out"
                ) from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point at ``step`` to each curve named in ``values``; it is written out at once."""
        for where in list(self._backends):
            try:
                self._backends[where].add(step, values)
            except Exception as error:
                logger.warning("%s failed at step %d (%s); the run goes on without it", where, step, _describe(error))
                del self._backends[where]

    def close(self) -> None:
        """Close every backend."""
        while self._backends:
            where, backend = self._backends.popitem()
            try:
                backend.close()
            except Exception as error:
                logger.warning("%s could not be closed (%s)", where, _describe(error))


class _Backend:
    """One backend, by itself: mmengine's Visualizer would take the others along with one that fails."""

    def __init__(self, options: Mapping[str, Any], config: RunConfig, num_steps: int) -> None:
        from mmengine.config import Config
        from mmengine.registry import VISBACKENDS
        from mmengine.visualization import TensorboardVisBackend, WandbVisBackend

        backend = VISBACKENDS.build({"type": options["type"], **_arguments(options, Path(config.work_dir))})
        self._backend = backend
        # The first call starts the backend.
        backend.add_config(Config(asdict(config)))
        self._tensorboard = backend.experiment if isinstance(backend, TensorboardVisBackend) else None
        self._wandb = backend.experiment if isinstance(backend, WandbVisBackend) else None
        if self._tensorboard is not None:
            _hide_later_points(self._tensorboard, num_steps)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self._wandb is not None:
            self._wandb.log({_WANDB_STEP: step}, commit=False)
        self._backend.add_scalars(dict(values), step)
        # It would keep points to itself for up to two minutes, and a killed run would lose them.
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        self._backend.close()


def _arguments(options: Mapping[str, Any], work_dir: Path) -> dict[str, Any]:
    """The backend's arguments: the config's, and our defaults."""
    defaults: dict[str, Any] = {"save_dir": str(work_dir / "logs")}
    if options["type"] == "WandbVisBackend":
        defaults["define_metric_cfg"] = [{"name": "*", "step_metric": _WANDB_STEP}]
    return defaults | {key: value for key, value in options.items() if key != "type"}


def _hide_later_points(writer: Any, num_steps: int) -> None:
    """Have TensorBoard drop what earlier files hold after ``num_steps`` steps.

    It is what ``SummaryWriter(purge_step=...)`` writes; mmengine's backend has no argument for it. A run that starts
    afresh has to write it as well: TensorBoard takes the first for the beginning, and only others for a new start.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    start = SessionLog(status=SessionLog.START)
    writer.file_writer.add_event(Event(session_log=start), num_steps + 1)


def _describe(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
