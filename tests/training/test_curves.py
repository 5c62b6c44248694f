"""The backends of the curves: TensorBoard read back, one's own by custom_imports, and what is refused."""

import importlib.util
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from spt_dist.config import load_config
from spt_dist.errors import UserError
from spt_dist.sections import LogConfig
from spt_dist.training.curves import Curves, check_backends
from tests.training.configs_for_tests import make_config, read_curves

OWN_BACKEND = """
import json
from pathlib import Path

from mmengine.registry import VISBACKENDS
from mmengine.visualization import BaseVisBackend


@VISBACKENDS.register_module(force=True)
class {name}(BaseVisBackend):
    def __init__(self, save_dir, fails_at=None, greeting=""):
        super().__init__(save_dir)
        self.path, self.fails_at, self.greeting = Path(save_dir) / "calls.jsonl", fails_at, greeting

    experiment = None

    def _init_env(self):
        pass

    def note(self, **call):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(call) + "\\n")

    def add_config(self, config, **kwargs):
        if self.fails_at == 0:
            raise ConnectionError("no\\nserver")
        self.note(greeting=self.greeting, work_dir=config.work_dir, lr=config.train.lr)

    def add_scalars(self, scalar_dict, step=0, file_path=None, **kwargs):
        if step == self.fails_at:
            raise ConnectionError("server has gone")
        self.note(step=step, **scalar_dict)

    def close(self):
        self.note(closed=True)
        if self.fails_at == -1:
            raise ConnectionError("not now")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a backend that a config with ``custom_imports`` brings along; its config is ``tmp_path/config.py``."""
    name = "OwnVisBackend"
    (tmp_path / "own_curves.py").write_text(OWN_BACKEND.format(name=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "config.py").write_text(
        "custom_imports = dict(imports=['own_curves'])\n"
        "model = dict(name='vit_tiny_patch16_224', num_classes=10)\n"
        "data = dict(type='digits')\nmethod = dict(type='lora')\ntrain = dict(epochs=1, lr=0.25)\n"
        f"log = dict(backends=[dict(type='{name}', greeting='hello'), dict(type='TensorboardVisBackend')])\n"
        f"work_dir = {str(tmp_path / 'run')!r}\n"
    )
    load_config(tmp_path / "config.py")
    return name


def calls(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / "calls.jsonl").read_text().splitlines()]


def test_backend_from_custom_imports_and_tensorboard_get_the_same(own: str, tmp_path: Path) -> None:
    config = load_config(tmp_path / "config.py")
    check_backends(config.log)
    curves = Curves(config, 0)
    curves.add(3, {"train/loss": 0.5, "val/top1": 0.75})
    curves.add(4, {"train/loss": 0.25})
    curves.close()
    assert calls(tmp_path / "run") == [
        {"greeting": "hello", "work_dir": str(tmp_path / "run"), "lr": 0.25},
        {"step": 3, "train/loss": 0.5, "val/top1": 0.75},
        {"step": 4, "train/loss": 0.25},
        {"closed": True},
    ]
    assert read_curves(tmp_path / "run" / "logs") == {"train/loss": {3: 0.5, 4: 0.25}, "val/top1": {3: 0.75}}


def test_a_backend_that_fails_leaves_the_others_and_the_run_alone(
    own: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backends = [{"type": own, "fails_at": 2}, {"type": own, "fails_at": -1}, {"type": "TensorboardVisBackend"}]
    curves = Curves(make_config(tmp_path, backends=backends), 0)
    for step in (1, 2, 3):
        curves.add(step, {"x": float(step)})
    curves.close()
    assert [call["step"] for call in calls(tmp_path) if "step" in call] == [1, 1, 2, 3]
    assert read_curves(tmp_path / "logs") == {"x": {1: 1.0, 2: 2.0, 3: 3.0}}
    assert caplog.messages == [
        "log.backends[0] failed at step 2 (ConnectionError: server has gone); the run goes on without it",
        "log.backends[1] could not be closed (ConnectionError: not now)",
    ]


def test_a_backend_that_does_not_start_is_a_users_error(own: str, tmp_path: Path) -> None:
    backends = [{"type": "TensorboardVisBackend"}, {"type": own, "fails_at": 0}]
    message = r"log\.backends\[1\]: OwnVisBackend can't be started \(ConnectionError: no server\); change its arguments"
    with pytest.raises(UserError, match=message):
        Curves(make_config(tmp_path, backends=backends), 0)


def write(folder: str, num_steps: int, last: int, loss: float) -> Curves:
    """A run that writes the steps from ``num_steps`` to ``last``, and is not at its end yet."""
    curves = Curves(make_config(folder), num_steps)
    for step in range(num_steps + 1, last + 1):
        curves.add(step, {"train/loss": loss, f"only/{loss}": loss})
    return curves


def write_and_be_killed(folder: str) -> None:
    write(folder, 0, 7, 1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_runs_keep_their_points_and_resumed_ones_show_no_step_twice(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=write_and_be_killed, args=(str(tmp_path),))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert read_curves(tmp_path / "logs")["train/loss"] == dict.fromkeys(range(1, 8), 1.0)
    # TensorBoard reads files in the order of their names, which hold the second.
    time.sleep(1)
    write(str(tmp_path), 4, 6, 2.0)
    time.sleep(1)
    write(str(tmp_path), 5, 8, 3.0).close()
    curves = read_curves(tmp_path / "logs")
    assert curves["train/loss"] == {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 3.0, 7: 3.0, 8: 3.0}
    # A curve that the resumed runs have no point of loses what came after, too.
    assert curves["only/1.0"] == dict.fromkeys(range(1, 5), 1.0)


def test_two_folders_for_tensorboard(tmp_path: Path) -> None:
    backends = [{"type": "TensorboardVisBackend"}, {"type": "TensorboardVisBackend", "save_dir": str(tmp_path / "b")}]
    check_backends(LogConfig(backends=backends))
    curves = Curves(make_config(tmp_path / "a", backends=backends), 0)
    curves.add(1, {"x": 1.0})
    curves.close()
    assert read_curves(tmp_path / "a" / "logs") == read_curves(tmp_path / "b") == {"x": {1: 1.0}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "TensorbordVisBackend"}, r"\.type='TensorbordVisBackend' is unknown; did you mean 'TensorboardVis"),
        ({"type": "TensorboardVisBackend", "flush": 3}, r": TensorboardVisBackend .*'flush'; its arguments are save_"),
        ({"typ": "TensorboardVisBackend"}, r"=\{'typ': 'TensorboardVisBackend'\} has to be a dict with a type"),
        ("TensorboardVisBackend", r"='TensorboardVisBackend' has to be a dict with a type"),
        ({"type": 3}, r"=\{'type': 3\} has to be a dict with a type"),
    ],
)
def test_refused_backends(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"config: log\.backends\[1\]" + message):
        check_backends(LogConfig(backends=[{"type": "TensorboardVisBackend"}, options]))


@pytest.mark.parametrize(("name", "package"), [("WandbVisBackend", "wandb"), ("MLflowVisBackend", "mlflow")])
def test_a_package_that_is_missing_is_named(name: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=rf"log\.backends\[0\]: {name} needs .*: pip install {package}$"):
        check_backends(LogConfig(backends=[{"type": name}]))


def test_what_is_registered_but_no_backend_is_refused() -> None:
    from mmengine.registry import VISBACKENDS

    VISBACKENDS.register_module(name="JustADict", module=dict)
    try:
        with pytest.raises(UserError, match=r"log\.backends\[0\]\.type='JustADict' has to be a subclass of mmengine's"):
            check_backends(LogConfig(backends=[{"type": "JustADict"}]))
    finally:
        VISBACKENDS.module_dict.pop("JustADict")


def test_wandb_draws_against_the_step(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    backends = [{"type": "WandbVisBackend", "init_kwargs": {"mode": "offline", "project": "test"}}]
    check_backends(LogConfig(backends=backends))
    curves = Curves(make_config(tmp_path, backends=backends), 0)
    curves.add(30, {"train/loss": 0.5})
    assert wandb.run.summary["train/step"] == 30
    assert wandb.run.summary["train/loss"] == 0.5
    assert wandb.run.config["train"]["lr"] == 1e-3
    curves.close()
    assert wandb.run is None
    assert list((tmp_path / "logs" / "wandb").glob("offline-run-*"))


def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    backends = [{"type": "MLflowVisBackend", "tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}]
    check_backends(LogConfig(backends=backends))
    curves = Curves(make_config(tmp_path / "run", backends=backends), 0)
    curves.add(30, {"train/loss": 0.5})
    curves.close()
    run = mlflow.search_runs(output_format="list")[0]
    assert run.data.params["train.lr"] == "0.001"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(30, 0.5)]
