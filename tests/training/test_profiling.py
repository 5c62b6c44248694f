"""Traces of a few steps, read back as JSON."""

import gzip
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spt_dist.errors import UserError
from spt_dist.sections import LogConfig
from spt_dist.training.profiling import check_profile, profiled_steps
from tests.ranks import run_ranks


def train(folder: str, wanted: int, steps: int, fails_after: int | None = None) -> list[int]:
    """Steps of two products each, named ``step-0`` and so on in the trace; those after which there was a trace."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    written = []
    with profiled_steps(LogConfig(profile_steps=wanted), Path(folder), rank) as profiler:
        for step in range(steps):
            with torch.profiler.record_function(f"step-{step}"):
                torch.ones(8, 8 + rank) @ torch.ones(8 + rank, 8) @ torch.ones(8, 8)
            if step == fails_after:
                raise MemoryError("too large")
            profiler.step()
            if Path(folder, "logs", f"trace-rank-{rank}.json.gz").exists():
                written.append(step)
    return written


def read_trace(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The events of a rank's trace."""
    with gzip.open(folder / "logs" / f"trace-rank-{rank}.json.gz", "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def count(events: list[dict[str, Any]], start: str) -> dict[str, int]:
    """How often each name that begins with ``start`` occurs as an operator or a label."""
    names = [
        event["name"] for event in events if event.get("cat") in ("cpu_op", "user_annotation") and event["ph"] == "X"
    ]
    return {name: names.count(name) for name in sorted(set(names)) if name.startswith(start)}


@pytest.mark.distributed
def test_each_rank_leaves_a_trace_of_the_steps_after_the_warm_up(tmp_path: Path) -> None:
    assert run_ranks(train, 2, str(tmp_path), 2, 8) == [[4, 5, 6, 7]] * 2
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "trace-rank-0.json.gz",
        "trace-rank-1.json.gz",
    ]
    for rank in range(2):
        events = read_trace(tmp_path, rank)
        assert count(events, "step-") == {"step-3": 1, "step-4": 1}
        assert count(events, "ProfilerStep") == {"ProfilerStep#3": 1, "ProfilerStep#4": 1}
        products = [event for event in events if event["name"] == "aten::mm"]
        assert len(products) == 4
        assert products[0]["args"]["Input Dims"] == [[8, 8 + rank], [8 + rank, 8]]


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spt_dist")
    train(str(tmp_path), 50, 5)
    assert count(read_trace(tmp_path), "step-") == {"step-3": 1, "step-4": 1}
    trace = tmp_path / "logs" / "trace-rank-0.json.gz"
    assert caplog.messages == [f"trace of 2 steps: {trace}, to be opened at https://ui.perfetto.dev"]


def test_a_run_that_fails_leaves_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match="too large"):
        train(str(tmp_path), 50, 10, fails_after=4)
    assert count(read_trace(tmp_path), "step-") == {"step-3": 1, "step-4": 1}
    assert not torch.autograd.profiler._is_profiler_enabled


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_a_run_that_ends_in_the_warm_up_says_so(steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(str(tmp_path), 4, steps)
    assert caplog.messages == ["log.profile_steps=4: training ended in the 3 steps of warm-up"]
    assert list(tmp_path.iterdir()) == []
    assert not torch.autograd.profiler._is_profiler_enabled


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spt_dist")
    train(str(tmp_path), 0, 5)
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == []


def test_a_memory_snapshot_needs_a_gpu_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    check_profile(LogConfig())
    check_profile(LogConfig(profile_steps=5))
    with pytest.raises(UserError, match=r"config: log\.memory_snapshot=True.*there is no GPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        check_profile(LogConfig(memory_snapshot=True, profile_steps=5))
    with pytest.raises(UserError, match=r"config: log\.memory_snapshot=True, but log\.profile_steps=0"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        check_profile(LogConfig(memory_snapshot=True))


@pytest.mark.gpu
def test_trace_and_memory_snapshot_of_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    log = LogConfig(profile_steps=2, memory_snapshot=True)
    check_profile(log)
    with profiled_steps(log, tmp_path, 0) as profiler:
        for step in range(8):
            block = torch.ones(2**20 + 2**10 * step, device="cuda")
            block = block.view(2**10, -1).T @ block.view(2**10, -1)
            del block
            profiler.step()
    kernels = [event for event in read_trace(tmp_path) if event.get("cat") == "kernel"]
    assert kernels
    # A plain pickle of lists and dicts, made by the test itself.
    snapshot = pickle.loads((tmp_path / "logs" / "memory-rank-0.pickle").read_bytes())
    sizes = {event["size"] for trace in snapshot["device_traces"] for event in trace if event["action"] == "alloc"}
    blocks = {step: 4 * (2**20 + 2**10 * step) for step in range(8)}
    assert {step for step, size in blocks.items() if size in sizes} == {3, 4}
