"""How hard the mini-benchmark's tasks are: a linear probe and the nearest neighbours in pixels.

Example:

    python launch/prepare_data.py mini --make data/mini
    python tools/probe_mini.py data/mini

Shape suffixes: N images, H rows, W columns, C channels, F features.
"""

import argparse
from pathlib import Path
from typing import Any

# Must come before timm: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # noqa: F401  # isort: skip

import numpy as np
import numpy.typing as npt
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

from spt_dist.config import load_config
from spt_dist.data.lists.vtab import read_vtab_list
from spt_dist.data.mini.tasks import MINI_TASKS
from spt_dist.models.checkpoints import load_backbone

CONFIG = Path(__file__).parents[1] / "configs/mini/digits.py"
STRENGTHS = (0.01, 0.1, 1.0)


def read(root: Path, task: str, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images, uint8 (N, H, W, 3), and labels (N,) of a list."""
    listed = read_vtab_list(root / task, split, MINI_TASKS[task].num_classes)
    images = [np.asarray(Image.open(root / task / file)) for file in listed.files]
    return np.stack(images), np.array(listed.labels)


@torch.no_grad()
def features(model: Any, images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What the head of the frozen backbone would get: (N, F)."""
    # As vtab_inception normalises, and as the backbone was pre-trained.
    images_NCHW = (torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    parts = images_NCHW.split(250)
    return torch.cat([model.forward_head(model.forward_features(part), pre_logits=True) for part in parts]).numpy()


def probe(root: Path, task: str, model: nn.Module) -> tuple[float, float, float]:
    """Test accuracies, 0 to 1: of the most frequent class, a linear probe, and 5 nearest neighbours in pixels.

    The probe's strength of regularisation is the one that is best on val200 when trained on train800.
    """
    data = {split: read(root, task, split) for split in ("train800", "val200", "train800val200", "test")}
    seen = {split: features(model, images_NHWC) for split, (images_NHWC, _) in data.items()}

    def fitted(split: str, strength: float) -> Any:
        scaler = StandardScaler().fit(seen[split])
        classifier = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(seen[split]), data[split][1])
        return lambda other: classifier.score(scaler.transform(seen[other]), data[other][1])

    best = max(STRENGTHS, key=lambda strength: fitted("train800", strength)("val200"))
    train_NHWC, train_labels = data["train800val200"]
    test_NHWC, test_labels = data["test"]
    neighbours = KNeighborsClassifier(5).fit(train_NHWC.reshape(len(train_NHWC), -1) / 255.0, train_labels)
    by_pixels = neighbours.score(test_NHWC.reshape(len(test_NHWC), -1) / 255.0, test_labels)
    return np.bincount(test_labels).max() / len(test_labels), fitted("train800val200", best)("test"), by_pixels


def main() -> None:
    """Probes each task and prints a table."""
    parser = argparse.ArgumentParser(description="How hard the mini-benchmark's tasks are for frozen features.")
    parser.add_argument("root", type=Path, help="the folder that `launch/prepare_data.py mini --make` made")
    root = parser.parse_args().root
    settings = load_config(CONFIG).model
    assert settings.checkpoint is not None, "the mini-benchmark's configs start from the demo backbone"
    model = timm.create_model(settings.name, num_classes=0, **settings.kwargs).eval()
    load_backbone(model, settings.checkpoint)
    table = Table("task", "group", "classes", "most frequent, %", "linear probe, %", "5-NN on pixels, %")
    for task, known in MINI_TASKS.items():
        scores = probe(root, task, model)
        table.add_row(task, known.group, str(known.num_classes), *(f"{100 * score:.1f}" for score in scores))
    Console().print(table)


if __name__ == "__main__":
    main()
