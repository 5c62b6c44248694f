"""Published results that suites are compared with. Top-1 in percent, one seed's or a mean as the source has it.

He et al., *Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning*, ICCV 2023: Tables 1 (VTAB-1k by task: Table 10),
2 and 4. The rows of peers are as that paper quotes them; those of methods that there are no runs of are left out.
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
    """One row.

    Attributes:
        label: what the source calls it.
        mean: the mean that the source prints; of VTAB-1k that of the groups' means. ``None`` for none.
        share: trained parameters in percent of the backbone's, as printed; ``None`` where that is not known.
        tasks: top-1 of a task, in percent; those that the source leaves out, or that can't be read there, are missing.
    """

    label: str
    mean: float | None = None
    share: float | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)


def _vtab(row: str) -> dict[str, float]:
    """A row of Table 10, in its order; "?" where it can't be read."""
    values = row.replace("|", " ").split()
    return {task: float(value) for task, value in zip(_VTAB_TASKS, values, strict=True) if value != "?"}


# Name of a table, as in `suite.published` -> the tasks that its means are over.
PUBLISHED_TASKS: dict[str, tuple[str, ...]] = {
    "fgvc": ("cub", "nabirds", "flowers", "dogs", "cars"),
    **dict.fromkeys(("vtab", "vtab_mae", "vtab_mocov3", "vtab_swin-b", "vtab_convnext-b"), _VTAB_TASKS),
}
# Name of a table -> method of a run, as in its summary -> what the paper has for it.
PUBLISHED: dict[str, dict[str, tuple[Published, ...]]] = {
    "vtab": {
        "full": (
            Published(
                "full fine-tuning",
                69.0,
                100.0,
                _vtab(
                    "68.9 87.7 64.3 97.2 86.9 87.4 38.8 | 79.7 95.7 84.2 73.9 | 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1"
                ),
            ),
        ),
        "linear": (Published("linear probe", 57.6, 0.04),),
        "bias": (Published("BIAS", 65.2, 0.13),),
        "partial": (Published("PARTIAL-1", 60.7, 8.30),),
        "vpt": (
            Published(
                "VPT-deep",
                72.0,
                1.14,
                _vtab(
                    "78.8 90.8 65.8 98.0 88.3 78.1 49.6 | 81.8 96.1 83.4 ? | 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8"
                ),
            ),
        ),
        "adapter": (
            Published(
                "ADAPTER-8",
                73.9,
                0.23,
                _vtab(
                    "69.2 90.1 68.0 98.8 89.9 82.8 54.3 | 84.0 94.9 81.9 ? | 80.9 65.3 48.6 78.3 74.8 48.5 29.9 41.6"
                ),
            ),
            Published("ADAPTER-32", 74.0, 0.71),
        ),
        "lora": (
            Published("LoRA-8", 74.9, 0.23),
            Published(
                "LoRA-16",
                75.0,
                0.69,
                _vtab(
                    "68.1 91.4 69.8 99.0 90.5 86.4 53.1 | 85.1 95.8 84.7 ? | 83.0 66.9 50.4 81.4 80.2 46.6 32.2 41.1"
                ),
            ),
        ),
        "spt-adapter": (
            Published("SPT-Adapter, 0.30 %", 75.8, 0.30),
            Published(
                "SPT-Adapter, 0.44 %",
                76.4,
                0.44,
                _vtab(
                    "72.9 93.2 72.5 99.3 91.4 88.8 55.8 | 86.2 96.1 85.5 ? | 83.0 68.0 51.9 81.2 82.4 51.9 31.7 41.2"
                ),
            ),
        ),
        "spt-lora": (
            Published("SPT-LoRA, 0.31 %", 75.9, 0.31),
            Published(
                "SPT-LoRA, 0.63 %",
                76.4,
                0.63,
                _vtab(
                    "73.5 93.3 72.5 99.3 91.5 87.9 55.5 | 85.7 96.2 85.9 ? | 84.4 67.6 52.5 82.0 81.0 51.1 30.2 41.3"
                ),
            ),
        ),
    },
    "fgvc": {
        "full": (Published("full fine-tuning", 88.5, 100.0),),
        "linear": (Published("linear probe", 79.3, 0.12),),
        "bias": (Published("BIAS", 88.4, 0.13),),
        "partial": (Published("PARTIAL-1", 82.6, 8.38),),
        "vpt": (Published("VPT-deep", 89.1, 0.98),),
        "adapter": (Published("ADAPTER-8", 85.5, 0.39), Published("ADAPTER-32", 85.6, 0.95)),
        "lora": (Published("LoRA-8", 86.0, 0.55), Published("LoRA-16", 84.8, 0.90)),
        "spt-adapter": (Published("SPT-Adapter, 0.41 %", 89.5, 0.41), Published("SPT-Adapter, 0.47 %", 89.8, 0.47)),
        "spt-lora": (Published("SPT-LoRA, 0.41 %", 89.3, 0.41), Published("SPT-LoRA, 0.60 %", 90.1, 0.60)),
    },
    "vtab_mae": {
        "vpt": (Published("MAE, VPT-deep", 41.1),),
        "adapter": (Published("MAE, ADAPTER-8", 63.4), Published("MAE, ADAPTER-32", 62.5)),
        "lora": (Published("MAE, LoRA-8", 64.3), Published("MAE, LoRA-16", 64.8)),
        "spt-adapter": (
            Published("MAE, SPT-Adapter, 0.26 %", 69.2, 0.26),
            Published("MAE, SPT-Adapter, 0.41 %", 69.7, 0.41),
        ),
        "spt-lora": (
            Published("MAE, SPT-LoRA, 0.29 %", 68.5, 0.29),
            Published("MAE, SPT-LoRA, 0.69 %", 69.8, 0.69),
        ),
    },
    "vtab_mocov3": {
        "vpt": (Published("MoCo v3, VPT-deep", 65.2),),
        "adapter": (Published("MoCo v3, ADAPTER-8", 49.0), Published("MoCo v3, ADAPTER-32", 68.2)),
        "lora": (Published("MoCo v3, LoRA-8", 44.3), Published("MoCo v3, LoRA-16", 42.9)),
        "spt-adapter": (
            Published("MoCo v3, SPT-Adapter, 0.08 %", 73.7, 0.08),
            Published("MoCo v3, SPT-Adapter, 0.30 %", 74.4, 0.30),
        ),
        "spt-lora": (
            Published("MoCo v3, SPT-LoRA, 0.30 %", 75.0, 0.30),
            Published("MoCo v3, SPT-LoRA, 0.50 %", 75.3, 0.50),
        ),
    },
    "vtab_swin-b": {
        "adapter": (Published("Swin-B, ADAPTER-8", 76.7),),
        "lora": (Published("Swin-B, LoRA-8", 76.3),),
        "spt-adapter": (Published("Swin-B, SPT-Adapter, 0.33 %", 77.5, 0.33),),
        "spt-lora": (Published("Swin-B, SPT-LoRA, 0.49 %", 77.2, 0.49),),
    },
    "vtab_convnext-b": {
        "adapter": (Published("ConvNeXt-B, ADAPTER-8", 77.5),),
        "lora": (Published("ConvNeXt-B, LoRA-8", 77.0),),
        "spt-adapter": (Published("ConvNeXt-B, SPT-Adapter, 0.36 %", 78.4, 0.36),),
        "spt-lora": (Published("ConvNeXt-B, SPT-LoRA, 0.57 %", 78.7, 0.57),),
    },
}
