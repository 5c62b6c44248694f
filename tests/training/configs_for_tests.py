"""A run's config, and its curves read back."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as ShownAccumulator
from tensorboard.util.tensor_util import make_ndarray

from spt_dist.sections import LogConfig, ModelConfig, RunConfig, TrainConfig


def make_config(work_dir: Path | str, epochs: int = 2, **log: Any) -> RunConfig:
    """A whole config; ``log`` are the keys of its log section."""
    return RunConfig(
        model=ModelConfig(name="vit_tiny_patch16_224", num_classes=10),
        data={"type": "digits"},
        method={"type": "lora"},
        train=TrainConfig(epochs=epochs),
        log=LogConfig(**log),
        work_dir=str(work_dir),
    )


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a folder: name of the curve -> step -> value, each step at most once."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    # The one that TensorBoard itself reads with hides the points of killed runs by stricter rules.
    shown = ShownAccumulator(str(folder), tensor_size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        assert points == [(point.step, make_ndarray(point.tensor_proto).item()) for point in shown.Tensors(tag)]
        curves[tag] = dict(points)
        assert list(curves[tag].items()) == sorted(points), f"{tag} repeats steps or goes back: {points}"
    return curves
