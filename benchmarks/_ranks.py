"""Running a function on several gloo ranks of one thread each, every time on new ones."""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# Ranks then start from a process that has imported everything, instead of importing it each.
_context.set_forkserver_preload(["spt_dist", "timm", "deepspeed"])


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo group and return the results in the order of the ranks.

    Args:
        function: one that can be pickled, as its result and ``args``.
        ranks: number of processes.
        args: the same on every rank.

    Raises:
        RuntimeError: a rank failed, and has printed why.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_run_rank, args=(function, rank, ranks, folder, args)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise RuntimeError(f"{function.__name__} on {ranks} ranks: exit codes {codes}")
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(ranks)]


def _run_rank(function: Callable[..., Any], rank: int, ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # DeepSpeed wants what a launcher would have set.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    result = function(*args)
    Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
    # Nobody leaves before all are done. Who is left may find the connection closed by one who was through before.
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()
