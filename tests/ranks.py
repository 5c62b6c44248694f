"""Running a function on several real gloo ranks."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# Children then start from a process that has imported everything, instead of importing it each.
_context.set_forkserver_preload(["spt_dist", "timm", "deepspeed"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo group and return the results in the order of the ranks.

    Args:
        function: a function at the top of a test module; its result has to be picklable.
        world_size: number of processes.
        args: picklable arguments, the same on every rank.
        timeout: seconds until the ranks are killed and the test fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_run_rank, args=(function, rank, world_size, folder, timeout, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        results = [_read(Path(folder, f"result-{rank}")) for rank in range(world_size)]
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
        if hung or failed:
            pytest.fail(f"ranks {hung} hung after {timeout} s\n" * bool(hung) + "\n".join(map(str, failed)))
        return [value for _, value in results]


def _read(path: Path) -> tuple[bool, Any]:
    return pickle.loads(path.read_bytes()) if path.exists() else (False, "ended without a result")


def _run_rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # DeepSpeed wants what a launcher would have set.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    Path(folder, f"result-{rank}").write_bytes(pickle.dumps(outcome))
    if outcome[0]:
        dist.barrier()
    dist.destroy_process_group()
