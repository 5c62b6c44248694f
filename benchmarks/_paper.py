"""A model of what the engines send in a training step, for numbers of ranks that nobody has at hand.

Payloads are those of ``_traffic``, in bytes of fp32; constants are what engines and trainer exchange beside: losses,
norms, flags.
"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

from _traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, ring_factor  # type: ignore[import-not-found]
from spt_dist.models.matrices import take_inventory
from spt_dist.report.canvas import save_figure
from spt_dist.tables import format_table

FP32 = 4
NODE = 8
# Bytes a second that a GPU sends: NVLink in a node, one 400 Gb/s InfiniBand port a GPU between nodes.
NVLINK, INFINIBAND = 450e9, 50e9
TABLE_RANKS = (8, 16, 32, 64, 256, 1024)
LINKS = (
    "a model, not a measurement: one ring through all GPUs, no latency, nothing overlapped; NVLink 450 GB/s a GPU in\n"
    f"nodes of {NODE}, one 400 Gb/s InfiniBand port a GPU between them"
)
# FSDP2 with a copy of the weights on each node.
HYBRID = f"fsdp, shard_size={NODE}"
# Those that differ: name, color and width of the line, so that lines on the same place can be seen.
_LINES = {
    "ddp": ("ddp, ZeRO-0", "C0", 4.0),
    "zero1": ("ZeRO-1, ZeRO-2", "C1", 4.0),
    "zero3": ("ZeRO-3", "C2", 1.5),
    "fsdp": ("fsdp", "C3", 1.5),
    HYBRID: (HYBRID, "C4", 1.5),
}


@dataclass(frozen=True)
class Sizes:
    """What the traffic of a model depends on.

    Attributes:
        trained: number of trained parameters, the head's included.
        frozen: number of the others.
        tensors: of the weights that FSDP2 spreads: length of axis 0, numbers in all.
        trains_all: whether the whole backbone is trained.
    """

    trained: int
    frozen: int
    tensors: tuple[tuple[int, int], ...]
    trains_all: bool

    def padded(self, ranks: int) -> int:
        """Bytes that FSDP2 gathers: it cuts along axis 0, and the ranks' parts are of one size."""
        return FP32 * sum(-(-rows // ranks) * ranks * (numel // rows) for rows, numel in self.tensors)


def sizes_of(model: nn.Module, trained: int | float) -> tuple[Sizes, Sizes]:
    """Sizes with a few parameters trained, and with all.

    Args:
        model: before injection, on any device.
        trained: how many beside the head, or which share of the backbone.
    """
    inventory = take_inventory(model)
    # Whole on every rank under FSDP2.
    kept = {*inventory.head, *inventory.always_tuned}
    tensors = {name: (len(parameter), parameter.numel()) for name, parameter in model.named_parameters()}
    spread = tuple(tensor for name, tensor in tensors.items() if name not in kept)
    total = sum(numel for _, numel in tensors.values())
    head = sum(tensors[name][1] for name in inventory.head)
    count = round(trained * (total - head)) if isinstance(trained, float) else trained
    return Sizes(count + head, sum(n for _, n in spread), spread, False), Sizes(total, 0, tuple(tensors.values()), True)


def payloads(sizes: Sizes, engine: str, ranks: int) -> dict[str, int]:
    """Kind of collective -> bytes of its payloads in a step.

    For ZeRO-3 each weight is gathered once, as counted on a ViT-S; larger models gather up to twice.
    """
    trained, losses = FP32 * sizes.trained, 8
    if engine in ("ddp", "zero0"):
        return {ALL_REDUCE: trained + losses}
    if engine in ("zero1", "zero2"):
        return {ALL_REDUCE: trained + losses + 8, ALL_GATHER: trained}
    if engine == "zero3":
        return {ALL_GATHER: trained + FP32 * sizes.frozen, REDUCE_SCATTER: trained, ALL_REDUCE: losses + 16}
    gathered = sizes.padded(ranks)
    if not sizes.trains_all:
        return {ALL_GATHER: 2 * gathered, ALL_REDUCE: trained + losses}
    return {ALL_GATHER: 2 * gathered, REDUCE_SCATTER: gathered, ALL_REDUCE: losses + FP32 * len(sizes.tensors)}


def legs(sizes: Sizes, engine: str, ranks: int) -> tuple[float, float]:
    """Bytes that a GPU sends in a step in rings within a node, and in rings over nodes."""
    if engine != HYBRID or ranks <= NODE:
        found = payloads(sizes, engine.partition(",")[0], ranks)
        sent = sum(ring_factor(kind, ranks) * payload for kind, payload in found.items())
        return (sent, 0.0) if ranks <= NODE else (0.0, sent)
    found = payloads(sizes, "fsdp", NODE)
    # What is averaged over all ranks; gradients that are spread over a node are averaged over the nodes, part by part.
    over_nodes = ring_factor(ALL_REDUCE, ranks) * found.pop(ALL_REDUCE)
    over_nodes += ring_factor(ALL_REDUCE, ranks // NODE) * found.get(REDUCE_SCATTER, 0) / NODE
    return sum(ring_factor(kind, NODE) * payload for kind, payload in found.items()), over_nodes


def paper_table(name: str, tuned: Sizes, full: Sizes) -> str:
    """MB that a GPU sends in a step, and the milliseconds it takes, beside full fine-tuning's."""
    rows = []
    for engine, (label, _, _) in _LINES.items():
        for what, sizes in (("tuned", tuned), ("full", full)):
            cells = []
            for ranks in TABLE_RANKS:
                inside, outside = legs(sizes, engine, ranks)
                milliseconds = 1000 * (inside / NVLINK + outside / INFINIBAND)
                cells += [f"{(inside + outside) / 1e6:,.1f}", f"{milliseconds:,.2f}"]
            rows.append([f"{label}: {what}", *cells])
    title = (
        f"{name}, {tuned.trained:,} parameters trained (tuned) or {full.trained:,} (full), fp32: MB that a GPU sends "
        f"in a step, and\nmilliseconds; {LINKS}"
    )
    columns = [column for ranks in TABLE_RANKS for column in (f"{ranks} GPUs", "ms")]
    return format_table(title, ["", *columns], rows)


def draw_traffic(
    models: dict[str, tuple[Sizes, Sizes]], measured: dict[str, dict[tuple[str, bool, int], float]], path: Path
) -> Path:
    """Bytes that a GPU sends in a step over the number of GPUs, one panel a model.

    Args:
        models: name -> sizes of a tuned one and with everything trained.
        measured: name -> engine, whether all is trained, and number of ranks -> bytes, to be marked.
        path: the picture.
    """
    figure = Figure(figsize=(6.0 * len(models) + 1.8, 5.2), layout="constrained")
    every = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    ranks = [2**power for power in range(1, 11)]
    for axes, (name, (tuned, full)) in zip(every, models.items(), strict=True):
        for engine, (label, color, width) in _LINES.items():
            known = [number for number in ranks if engine != HYBRID or number >= NODE]
            for sizes, style in ((tuned, "-"), (full, "--")):
                sent = [sum(legs(sizes, engine, number)) for number in known]
                own_label = label if sizes is tuned else None
                axes.plot(known, sent, style, color=color, linewidth=width, alpha=0.8, label=own_label)
        for (engine, is_full, number), sent_bytes in measured.get(name, {}).items():
            if engine in _LINES:
                axes.plot(number, sent_bytes, "ks" if is_full else "ko", markersize=4, fillstyle="none")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks, [str(number) for number in ranks])
        axes.set(title=name, xlabel="number of GPUs")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    every[0].set_ylabel("bytes sent by each GPU in a training step")
    every[0].plot([], [], "k-", label="SPT-LoRA")
    every[0].plot([], [], "k--", label="full fine-tuning")
    every[0].plot([], [], "ko", fillstyle="none", label="measured, SPT-LoRA")
    every[0].plot([], [], "ks", fillstyle="none", label="measured, full")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return save_figure(figure, path)
