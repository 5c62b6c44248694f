"""What a run would train, and the memory that each rank would need, found out in seconds without data or weights."""

from dataclasses import asdict, dataclass
from typing import Any

from spt_dist.sections import RunConfig
from spt_dist.tables import format_table
from spt_dist.training.needs import GIB, CheckpointHeader, RunNeeds, Shape, Trainables

_PARTS = (
    "frozen weights",
    "gathered weights",
    "trained weights",
    "gradients",
    "optimizer state",
    "moving average",
    "scores",
    "communication buffers",
    "activations and temporaries",
)


@dataclass(frozen=True)
class DryRun:
    """What a run would need.

    Attributes:
        model: timm's name of the backbone.
        engine: how it is trained, in words.
        world_size: number of ranks.
        image_shape: ``(channels, height, width)``.
        samples: in one pass of a rank, the most.
        passes: of a rank in a step.
        trainables: what is trained.
        phases: part of the run -> what takes memory -> bytes on one rank, when that part takes most; they add up.
        kept: bytes that a pass of training keeps for its backward pass.
        host: bytes in the CPU's memory that DeepSpeed offloads to, on one rank.
        checkpoint: the backbone's file; ``None`` for random weights.
        fitting: most samples in one pass of a rank that fit in ``memory_gib``; ``None`` if it was not asked.
        memory_gib: GiB of a rank's device.
    """

    model: str
    engine: str
    world_size: int
    image_shape: Shape
    samples: int
    passes: int
    trainables: Trainables
    phases: dict[str, dict[str, int]]
    kept: int
    host: int
    checkpoint: CheckpointHeader | None
    fitting: int | None
    memory_gib: float | None

    @property
    def peak(self) -> int:
        """Most bytes that one rank needs at a time."""
        return max(sum(parts.values()) for parts in self.phases.values())

    def table(self) -> str:
        """All of it, for the terminal."""
        rows = [
            [what, *(_readable(parts.get(what, 0)) for parts in self.phases.values())]
            for what in _PARTS
            if any(parts.get(what) for parts in self.phases.values())
        ]
        rows.append(["total", *(_readable(sum(parts.values())) for parts in self.phases.values())])
        shape = " x ".join(map(str, self.image_shape))
        lines = [
            self.trainables.table,
            "",
            format_table(f"memory of one rank: {self.model}, {self.engine}", ["", *self.phases], rows),
            f"a rank's pass: {self.samples} samples of {shape}, {self.passes} in a step; kept for the backward pass: "
            f"{_readable(self.kept)}, {_readable(self.kept // self.samples)} a sample",
            f"checkpoint: {_checkpoint_words(self.checkpoint)}",
        ]
        if self.host:
            lines.append(f"in the CPU's memory, for each rank: {_readable(self.host)}")
        if self.memory_gib is not None:
            lines.append(self._fit())
        if not self.trainables.is_exact:
            lines.append("SPT's plan follows from the scores: its activations are those of the plan that keeps most")
        lines.append("not counted: the device's context and libraries, communication libraries, fragmentation")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it; sizes in bytes."""
        content = asdict(self)
        del content["trainables"]["table"]
        return content | {"peak": self.peak}

    def _fit(self) -> str:
        if not self.fitting:
            return f"in {self.memory_gib:g} GiB: does not fit, whatever train.batch_size"
        batch = self.fitting * self.passes * self.world_size
        needed = max((name for name in self.phases), key=lambda name: sum(self.phases[name].values()))
        fits = self.peak <= (self.memory_gib or 0) * GIB
        word = "fits" if fits else f"does not fit ({needed})"
        return f"in {self.memory_gib:g} GiB: {word}; up to {self.fitting:,} samples a pass, train.batch_size={batch:,}"


def plan_run(config: RunConfig, world_size: int, memory_gib: float | None = None) -> DryRun:
    """Count what a run would train and what each rank would need for it. No data, weights or devices are touched.

    Args:
        config: one that ``check_config`` accepts.
        world_size: ranks of the run.
        memory_gib: GiB of a rank's device, to find the largest batch that fits.

    Raises:
        UserError: as the run: an unknown model, a wrong argument of model, method or data, a checkpoint of another
            model, images that the model does not take.
    """
    needs = RunNeeds(config, world_size)
    memory = needs.rehearse(needs.samples)
    phases = {"training pass": needs.parts_of_pass(memory), "optimizer step": needs.parts_of_step()}
    if config.method["type"] == "spt" and config.sensitivity.scores is None:
        phases = {"scoring": needs.parts_of_scoring(), **phases}
    return DryRun(
        model=config.model.name,
        engine=_engine_words(config, world_size),
        world_size=world_size,
        image_shape=needs.image_shape,
        samples=needs.samples,
        passes=needs.passes,
        trainables=needs.trainables,
        phases=phases,
        kept=memory.kept,
        host=needs.share.host,
        checkpoint=needs.checkpoint,
        fitting=None if memory_gib is None else _most_samples(needs, int(memory_gib * GIB)),
        memory_gib=memory_gib,
    )


def _most_samples(needs: RunNeeds, memory: int) -> int:
    """The most samples of a pass of training with which a rank needs at most ``memory`` bytes; 0 for none."""

    def needed(num_samples: int) -> int:
        return max(sum(needs.parts_of_pass(needs.rehearse(num_samples)).values()), sum(needs.parts_of_step().values()))

    low, least = 1, needed(1)
    if least > memory:
        return 0
    # Memory grows all but linearly with the samples.
    slope = max(1, needed(2) - least)
    high = most = 0
    while not high or high - low > 1:
        if high:
            guess = low + (memory - least) * (high - low) // (most - least)
            guess = min(max(guess, low + 1), high - 1)
        else:
            guess = low + 1 + (memory - least) // slope
        found = needed(guess)
        if found <= memory:
            low, least = guess, found
        else:
            high, most = guess, found
    return low


def _engine_words(config: RunConfig, world_size: int) -> str:
    engine = config.engine
    words = {"ddp": "ddp", "fsdp": f"fsdp (shards of {engine.shard_size or world_size})"}
    found = words.get(engine.type, f"deepspeed (ZeRO {engine.zero_stage}{', offload' if engine.offload else ''})")
    extras = [
        f"amp {engine.amp_dtype}" if engine.amp else "",
        f"frozen weights in {engine.frozen_dtype}" if engine.frozen_dtype else "",
        "activation checkpointing" if engine.activation_checkpointing else "",
    ]
    return ", ".join([f"{found} on {world_size} rank{'s' if world_size > 1 else ''}", *filter(None, extras)])


def _readable(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def _checkpoint_words(header: CheckpointHeader | None) -> str:
    if header is None:
        return "none, random weights"
    if header.size is None:
        return f"{header.location} is not there yet"
    return f"{header.location}, {_readable(header.size)}, {', '.join(header.dtypes)}"
