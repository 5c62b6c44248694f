"""What collectives move: counted where torch dispatches them, and as the loopback device sees it."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
BROADCAST, REDUCE = "broadcast", "reduce"
# Name of an operator of c10d or _c10d_functional, by what it starts with.
_STARTS = {
    "allreduce": ALL_REDUCE,
    "all_reduce": ALL_REDUCE,
    "allgather": ALL_GATHER,
    "all_gather": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "broadcast": BROADCAST,
    "reduce": REDUCE,
}
_ISOLATED = "--isolated"


class Traffic(TorchDispatchMode):
    """Counts what this rank takes part in inside the block.

    DDP's reducer, FSDP2, DTensor and DeepSpeed all come by here. A *payload* is the whole tensor that a collective is
    about: what an all-reduce adds up, what an all-gather ends with, what a reduce-scatter starts from.

    Attributes:
        payload: kind of collective -> bytes of the payloads.
        ring: bytes that a rank sends, on the average over the ranks, if each collective goes round a ring.
        gloo: the same with what gloo does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()
        self.ring = self.gloo = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A mode comes before DTensor; this lets DTensor turn into its collectives first.
        if DTensor in types:
            return NotImplemented
        namespace, _, name = func._schema.name.partition("::")
        has_group = any(argument.name in ("process_group", "group_name") for argument in func._schema.arguments)
        if namespace in ("c10d", "_c10d_functional") and has_group and "barrier" not in name:
            self._count(name.lstrip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        kind = next((kind for start, kind in _STARTS.items() if name.startswith(start)), None)
        assert kind is not None, f"{name} is a collective that is not counted"
        sizes = [sum(_bytes(leaf) for leaf in tree_leaves(value)) for value in args]
        groups = [group for group in map(_find_group, args) if group is not None]
        # The functional collectives name their group, and get inputs only.
        if groups:
            payload, ranks = max(sizes), groups[0].size()
        else:
            ranks = _resolve_process_group(args[-1]).size()
            payload = sizes[0] * (ranks if kind == ALL_GATHER else 1)
        self.payload[kind] += payload
        self.ring += ring_factor(kind, ranks) * payload
        self.gloo += _gloo_factor(kind, ranks, payload) * payload


def ring_factor(kind: str, ranks: int) -> float:
    """Bytes that a rank sends for each byte of the payload, on the average over the ranks, in a ring."""
    once = (ranks - 1) / ranks
    return 2 * once if kind == ALL_REDUCE else once


def _gloo_factor(kind: str, ranks: int, payload: int) -> float:
    """As ``ring_factor``, of what torch's gloo does: other collectives in the place of two."""
    if kind == REDUCE_SCATTER:
        return ring_factor(ALL_REDUCE, ranks)
    if kind == REDUCE:
        # A reduce-scatter in a ring, whose parts then all go to one rank. The more segments of 1 MiB there are, the
        # more of them it sends once too often.
        segments = max(2 * ranks, -(-payload // 2**20))
        return 1 - 2 / segments + ring_factor(REDUCE, ranks) / ranks
    return ring_factor(kind, ranks)


def loopback_bytes() -> int:
    """Bytes sent over the loopback device of this network namespace so far, TCP's and IP's headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.partition(":")[2].split()[8]) for line in lines if line.strip().startswith("lo:"))


def isolate() -> bool:
    """Start this program anew in a network namespace of its own, where nobody else's bytes are counted.

    Returns:
        Whether it runs in one; ``False`` where the system does not allow that.
    """
    if sys.argv[-1] == _ISOLATED:
        sys.argv.pop()
        return True
    command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        return False
    return os.execvp(command[0], [*command, sys.executable, *sys.argv, _ISOLATED])


def _bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


def _find_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
        return dist.ProcessGroup.unbox(value)
    return None
