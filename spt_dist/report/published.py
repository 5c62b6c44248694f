"""Published results that suites are compared with. Top-1 in percent, one seed's or a mean as the source has it.

VTAB-1k (Table 10) and FGVC: He et al., *Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning*, ICCV 2023, ViT-B/16
pre-trained on ImageNet-21k. The rows of peers are as that paper quotes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_VTAB_TASKS = (
    *("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    *("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    *("clevr_count", "clevr_dist", "dmlab", "kitti"),
    *("dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele"),
)


@dataclass(frozen=True)
class Published:
    """One method's results.

    Attributes:
        label: what the source calls it.
        tasks: top-1 of a task, in percent; those that the source leaves out, or that can't be read there, are missing.
        mean: the mean that the source prints; ``None`` for none.
    """

    label: str
    tasks: Mapping[str, float] = field(default_factory=dict)
    mean: float | None = None


def _vtab(label: str, mean: float | None, row: str) -> Published:
    """A row of Table 10, in its order; "?" where it can't be read."""
    values = row.replace("|", " ").split()
    tasks = {task: float(value) for task, value in zip(_VTAB_TASKS, values, strict=True) if value != "?"}
    return Published(label, tasks, mean)


# Method of a run, as in its summary -> what the paper has for it. Its mean of VTAB-1k is that of the groups' means.
PUBLISHED_TASKS: dict[str, tuple[str, ...]] = {
    "vtab": _VTAB_TASKS,
    "fgvc": ("cub", "nabirds", "flowers", "dogs", "cars"),
}
PUBLISHED: dict[str, dict[str, Published]] = {
    "vtab": {
        "full": _vtab(
            "full fine-tuning",
            69.0,
            "68.9 87.7 64.3 97.2 86.9 87.4 38.8 | 79.7 95.7 84.2 73.9 | 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1",
        ),
        "linear": Published("linear probe", mean=57.6),
        "vpt": _vtab(
            "VPT-deep",
            72.0,
            "78.8 90.8 65.8 98.0 88.3 78.1 49.6 | 81.8 96.1 83.4 ? | 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8",
        ),
        "adapter": _vtab(
            "ADAPTER-8",
            73.9,
            "69.2 90.1 68.0 98.8 89.9 82.8 54.3 | 84.0 94.9 81.9 ? | 80.9 65.3 48.6 78.3 74.8 48.5 29.9 41.6",
        ),
        "lora": _vtab(
            "LoRA-16",
            75.0,
            "68.1 91.4 69.8 99.0 90.5 86.4 53.1 | 85.1 95.8 84.7 ? | 83.0 66.9 50.4 81.4 80.2 46.6 32.2 41.1",
        ),
        "spt-adapter": _vtab(
            "SPT-Adapter, 0.44 %",
            76.4,
            "72.9 93.2 72.5 99.3 91.4 88.8 55.8 | 86.2 96.1 85.5 ? | 83.0 68.0 51.9 81.2 82.4 51.9 31.7 41.2",
        ),
        "spt-lora": _vtab(
            "SPT-LoRA, 0.63 %",
            76.4,
            "73.5 93.3 72.5 99.3 91.5 87.9 55.5 | 85.7 96.2 85.9 ? | 84.4 67.6 52.5 82.0 81.0 51.1 30.2 41.3",
        ),
    },
    "fgvc": {
        "full": Published("full fine-tuning", mean=88.5),
        "linear": Published("linear probe", mean=79.3),
        "vpt": Published("VPT-deep", mean=89.1),
        "adapter": Published("ADAPTER-8", mean=85.5),
        "lora": Published("LoRA-16", mean=84.8),
        "spt-adapter": Published("SPT-Adapter, 0.47 %", mean=89.8),
        "spt-lora": Published("SPT-LoRA, 0.60 %", mean=90.1),
    },
}
