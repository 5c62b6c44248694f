"""How much memory a GPU needs for which backbone, and how few GPUs will do: by the dry run, no GPU is needed.

For known backbones, SPT-LoRA, LoRA and full fine-tuning, each engine and what saves memory, printed are the GiB that
one GPU needs if there are 1 to 32 of them, and the fewest GPUs of 16, 24, 40 and 80 GiB that will do. Each GPU has the
same number of samples in a pass, however many there are. docs/gpu_needs.md says what is counted, and what is not.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import spt_dist  # noqa: F401  # isort: skip  # makes timm importable beside a CPU torch

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from _record import record
from spt_dist.config import load_config
from spt_dist.evaluation.rehearsal import PassMemory
from spt_dist.parallel.backbone import WHOLE, scoring_form
from spt_dist.report.canvas import save_figure
from spt_dist.sections import ModelConfig, RunConfig, SensitivityConfig, TrainConfig
from spt_dist.tables import format_table
from spt_dist.training.needs import GIB, RunNeeds
from spt_dist.training.pipeline import check_config

CONFIGS = Path(__file__).parents[1] / "configs"
NUM_CLASSES, IMAGE_SIZE = 100, 224
BACKBONES = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
    "Swin-B": "swin_base_patch4_window7_224",
    "Swin-L": "swin_large_patch4_window7_224",
    "ConvNeXt-B": "convnext_base",
    "ConvNeXt-L": "convnext_large",
}
METHODS: dict[str, dict[str, Any]] = {
    "SPT-LoRA": {"type": "spt", "structured": "lora", "rank": 8, "alpha": 1.0, "budget": 400_000},
    "LoRA": {"type": "lora", "rank": 8, "targets": ["q", "v"]},
    "full": {"type": "full"},
}
# ConvNeXt has no attention.
CONVNEXT_TARGETS = ["fc1", "fc2"]
SETR = "SETR-PUP ViT-L"
SETR_CONFIGS = {method: f"setr_pup_vit-l_512x512_{method.lower()}.py" for method in METHODS}
# SETR is trained with 16 images a step.
SETR_SAMPLES = 2
# From the one that sends least to the one that sends most.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"type": "ddp"},
    "ZeRO 2": {"type": "deepspeed", "zero_stage": 2},
    "fsdp": {"type": "fsdp"},
    "ZeRO 3": {"type": "deepspeed", "zero_stage": 3},
}
# ZeRO 3's figures are known to be too low (docs/gpu_needs.md), so none is said to need fewest GPUs because of them.
TRUSTED = ("ddp", "ZeRO 2", "fsdp")
RANKS = (1, 2, 4, 8, 16, 32)
MEMORIES = (16, 24, 40, 80)
# Of the picture, and the colours of what fits a size: the smaller, the lighter.
COLUMNS = [("ddp", 1), ("ddp", 2), *product(("ZeRO 2", "fsdp", "ZeRO 3"), (2, 8, 32))]
COLORS = ["#ffffd9", "#a1dab4", "#41b6c4", "#2c7fb8", "#253494"]
# What saves memory in training, and what does the same for the scoring pass: changes of engine and sensitivity.
SAVINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": ({}, {}),
    "amp": ({"amp": True}, {"dtype": "bfloat16"}),
    "checkpointing": ({"activation_checkpointing": True}, {"memory_limit_gib": 1.0}),
    "amp + checkpointing": (
        {"amp": True, "activation_checkpointing": True},
        {"dtype": "bfloat16", "memory_limit_gib": 1.0},
    ),
}
# Nothing of that, and all.
EXTREMES = ("fp32", "amp + checkpointing")


@dataclass(frozen=True)
class Setup:
    """A backbone and what is trained of it; ``config.train.batch_size`` is that of one rank."""

    backbone: str
    method: str
    config: RunConfig


@dataclass(frozen=True)
class Need:
    """Bytes that one rank needs to score (0 where nothing is scored) and to train."""

    scoring: int
    training: int

    @property
    def peak(self) -> int:
        """Bytes that the whole run needs."""
        return max(self.scoring, self.training)


# Engine and number of ranks -> what one of them needs.
Needs = Mapping[tuple[str, int], Need]
# Backbone, method and what saves memory -> needs.
Results = Mapping[tuple[str, str, str], Needs]


def make_setups(backbones: Iterable[str], samples: int) -> list[Setup]:
    """All methods on each of ``backbones``, with so many ``samples`` a rank (SETR: its config's)."""
    setups = []
    for backbone, method in product(backbones, METHODS):
        if backbone == SETR:
            config = load_config(CONFIGS / "ade20k" / SETR_CONFIGS[method])
            config = replace(config, train=replace(config.train, batch_size=SETR_SAMPLES))
        else:
            config = RunConfig(
                model=ModelConfig(name=BACKBONES[backbone], num_classes=NUM_CLASSES),
                data={"type": "digits", "image_size": IMAGE_SIZE},
                method=_method(method, backbone),
                train=TrainConfig(epochs=1, batch_size=samples),
                sensitivity=SensitivityConfig(batch_size=samples),
            )
        setups.append(Setup(backbone, method, config))
    return setups


def spread(config: RunConfig, saving: str, engine: str, ranks: int) -> RunConfig:
    """A setup's config under an engine, on so many ranks."""
    for_engine, for_scoring = SAVINGS[saving]
    return replace(
        config,
        train=replace(config.train, batch_size=config.train.batch_size * ranks),
        sensitivity=replace(config.sensitivity, **for_scoring),
        engine=replace(config.engine, **ENGINES[engine], **for_engine),
    )


def find_needs(config: RunConfig, saving: str) -> dict[tuple[str, int], Need]:
    """What one rank needs under each engine on each number of ranks.

    These are ``plan_dry``'s figures. A pass takes the same whatever the ranks, so it is rehearsed once for all of them.
    """
    passes: dict[bool, PassMemory] = {}
    scorings: dict[tuple[str, int, int], int] = {}
    found = {}
    for engine, ranks in product(ENGINES, RANKS):
        case = spread(config, saving, engine, ranks)
        check_config(case)
        needs = RunNeeds(case, ranks)
        keeps_gradients = needs.share.keeps_gradients
        if keeps_gradients not in passes:
            passes[keeps_gradients] = needs.rehearse(needs.samples)
        training = max(sum(needs.parts_of_pass(passes[keeps_gradients]).values()), sum(needs.parts_of_step().values()))
        scoring = 0
        if config.method["type"] == "spt":
            form, wanted = scoring_form(case.engine), case.sensitivity
            samples = min(wanted.batch_size, -(-wanted.num_samples // ranks))
            place = (form, 1 if form == WHOLE else ranks, samples)
            if place not in scorings:
                scorings[place] = sum(needs.parts_of_scoring().values())
            scoring = scorings[place]
        found[engine, ranks] = Need(scoring, training)
    return found


def fewest(peaks: Mapping[int, int], limit: float) -> int | None:
    """The lowest number of ranks whose peak is at most ``limit`` bytes; ``None`` if there is none."""
    return min((ranks for ranks, peak in peaks.items() if peak <= limit), default=None)


def fewest_of_any(needs: Needs, limit: float) -> tuple[int, str] | None:
    """The fewest ranks with at most ``limit`` bytes, and the first of the trusted engines that takes no more."""
    counts = {engine: fewest(peaks_of(needs, engine), limit) for engine in TRUSTED}
    fitting = [(ranks, engine) for engine, ranks in counts.items() if ranks is not None]
    return min(fitting, key=lambda found: found[0], default=None)


def peaks_of(needs: Needs, engine: str) -> dict[int, int]:
    """Number of ranks -> bytes of one of them."""
    return {ranks: need.peak for (own, ranks), need in needs.items() if own == engine}


def summary_table(results: Results, reserve: float) -> str:
    """Fewest GPUs of each size under any trusted engine, a row for each backbone and method.

    Args:
        results: all savings of each backbone and method.
        reserve: GiB of each GPU that are left to what the dry run doesn't count.
    """
    rows = []
    for backbone, method in labels_of(results):
        pairs = [
            [_words(fewest_of_any(results[backbone, method, saving], limit)) for saving in EXTREMES]
            for limit in _limits(reserve)
        ]
        # One word where nothing has to be saved.
        rows.append([f"{backbone}, {method}", *(" / ".join(dict.fromkeys(pair)) for pair in pairs)])
    title = (
        f"the fewest GPUs of each size, and the first engine of {', '.join(TRUSTED)} that does with so few: with\n"
        f"{' / '.join(EXTREMES)}; {reserve:g} GiB of each GPU left alone; -: not with 1 to {RANKS[-1]}"
    )
    return format_table(title, ["", *(f"{memory} GiB" for memory in MEMORIES)], rows)


def labels_of(results: Results) -> list[tuple[str, str]]:
    """Each backbone and method, in order."""
    return list(dict.fromkeys((backbone, method) for backbone, method, _ in results))


def detailed_table(results: Results, saving: str, reserve: float) -> str:
    """GiB of one GPU by their number, and the fewest of each size; a row for each backbone, method and engine.

    Args:
        results, reserve: as in ``summary_table``.
        saving: which of them.
    """
    rows = []
    for (backbone, method), engine in product(labels_of(results), ENGINES):
        needs = results[backbone, method, saving]
        counts = [fewest(peaks_of(needs, engine), limit) for limit in _limits(reserve)]
        cells = [_gib_words(needs[engine, ranks]) for ranks in RANKS]
        rows.append([f"{backbone}, {method}, {engine}", *cells, *(str(count or "-") for count in counts)])
    title = (
        f"{saving}: GiB that each GPU needs on 1 to {RANKS[-1]} of them, * where scoring takes more than training;\n"
        f"and the fewest of each size, {reserve:g} GiB of each left alone. ZeRO 3 really needs more than this"
    )
    columns = [*(f"on {ranks}" for ranks in RANKS), *(f"of {memory} GiB" for memory in MEMORIES)]
    return format_table(title, ["", *columns], rows)


def draw_needs(results: Results, reserve: float, path: Path) -> Path:
    """The GiB that each GPU needs as heat maps, one with nothing that saves memory and one with all of it.

    Args:
        results: all savings of each backbone and method.
        reserve: as in ``summary_table``.
        path: the picture.
    """
    labels = labels_of(results)
    figure = Figure(figsize=(14.0, 0.27 * len(labels) + 2.2), layout="constrained")
    for axes, saving in zip(figure.subplots(1, len(EXTREMES), sharey=True), EXTREMES, strict=True):
        draw_panel(axes, {label: results[(*label, saving)] for label in labels}, reserve)
        axes.set_title(saving, pad=28, fontweight="bold")
    words = [*(f"fits {memory} GiB" for memory in MEMORIES), f"more than {MEMORIES[-1]} GiB"]
    patches = [Patch(facecolor=color, edgecolor="0.5", label=word) for color, word in zip(COLORS, words, strict=True)]
    title = f"GiB that each GPU needs; {reserve:g} GiB of its own are left alone"
    figure.legend(handles=patches, title=title, loc="outside lower center", ncols=len(patches), frameon=False)
    return save_figure(figure, path)


def draw_panel(axes: Axes, needs: Mapping[tuple[str, str], Needs], reserve: float) -> None:
    """One heat map: a row for each backbone and method, a column for each engine and number of GPUs."""
    grid = [[row[column].peak for column in COLUMNS] for row in needs.values()]
    classes = [[sum(peak > limit for limit in _limits(reserve)) for peak in row] for row in grid]
    axes.imshow(classes, vmin=0, vmax=len(MEMORIES), cmap=ListedColormap(COLORS), aspect="auto")
    for (y, row), x in product(enumerate(grid), range(len(COLUMNS))):
        color = "white" if classes[y][x] >= len(MEMORIES) - 1 else "black"
        axes.text(x, y, f"{row[x] / GIB:.1f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(COLUMNS)), [str(ranks) for _, ranks in COLUMNS])
    axes.set_xlabel("number of GPUs")
    axes.set_yticks(range(len(needs)), [f"{backbone}, {method}" for backbone, method in needs])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for engine in ENGINES:
        own = [x for x, column in enumerate(COLUMNS) if column[0] == engine]
        words = engine if engine in TRUSTED else f"{engine} (too low)"
        axes.text(sum(own) / len(own), -0.8, words, ha="center", va="bottom")
        axes.axvline(own[0] - 0.5, color="white", linewidth=4)
    for y in range(len(METHODS), len(needs), len(METHODS)):
        axes.axhline(y - 0.5, color="white", linewidth=4)


def report(results: Results, samples: int, reserve: float) -> str:
    """All tables, below what they are of."""
    words = (
        f"{samples} images of {IMAGE_SIZE} x {IMAGE_SIZE} on each GPU in a pass ({SETR}: {SETR_SAMPLES} of 512 x 512); "
        "SPT-LoRA's scoring pass included.\n"
        "amp: bfloat16, also while scoring (sensitivity.dtype). checkpointing: of activations; the scoring pass keeps\n"
        "1 GiB of them at most (sensitivity.memory_limit_gib)."
    )
    details = [detailed_table(results, saving, reserve) for saving in SAVINGS]
    return "\n\n".join([words, summary_table(results, reserve), *details])


def _method(name: str, backbone: str) -> dict[str, Any]:
    method = METHODS[name]
    if name == "LoRA" and backbone.startswith("ConvNeXt"):
        return method | {"targets": CONVNEXT_TARGETS}
    return method


def _limits(reserve: float) -> list[float]:
    """Bytes of each size of GPU that a rank may take."""
    return [(memory - reserve) * GIB for memory in MEMORIES]


def _words(found: tuple[int, str] | None) -> str:
    if found is None:
        return "-"
    ranks, engine = found
    return "1" if ranks == 1 else f"{ranks} {engine}"


def _gib_words(need: Need) -> str:
    return f"{need.peak / GIB:.1f}{'*' if need.scoring > need.training else ' '}"


def main() -> None:
    known = [*BACKBONES, SETR]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/gpu_needs.py --backbones ViT-H/14 ViT-g/14 --samples 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backbones", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--samples", type=int, default=32, help=f"of a GPU in a pass ({SETR}: {SETR_SAMPLES})")
    parser.add_argument("--reserve", type=float, default=2.0, help="GiB of each GPU that are left alone")
    parser.add_argument("--picture", type=Path, help="draw heat maps into this file")
    parser.add_argument("--out", type=Path, help="also write the tables, dated, to this file")
    arguments = parser.parse_args()
    setups = make_setups(arguments.backbones, arguments.samples)
    cases = list(product(setups, SAVINGS))
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found = pool.map(find_needs, (setup.config for setup, _ in cases), (saving for _, saving in cases))
        results = {
            (setup.backbone, setup.method, saving): needs for (setup, saving), needs in zip(cases, found, strict=True)
        }
    record(report(results, arguments.samples, arguments.reserve), arguments.out)
    if arguments.picture is not None:
        draw_needs(results, arguments.reserve, arguments.picture)


if __name__ == "__main__":
    main()
