"""One config under every launcher, engine and number of ranks: the same run."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.launch.processes import Launch, ScriptResult, run_all
from tests.launch.runs import (
    BUDGET,
    STEPS_PER_EPOCH,
    assert_same_curve,
    assert_same_plan,
    assert_same_task,
    read_lines,
    read_losses,
    read_plan,
    read_summary,
    read_task,
    write_backbone,
    write_config,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 8
ALONE = "python"
# Name -> launcher, ranks, engine, ZeRO stage.
TOGETHER: dict[str, tuple[str, int, str, int]] = {
    "torchrun, ddp": ("torchrun", 2, "ddp", 0),
    "torchrun, ddp, three ranks": ("torchrun", 3, "ddp", 0),
    "deepspeed, ddp": ("deepspeed", 2, "ddp", 0),
    "torchrun, ZeRO 0": ("torchrun", 2, "deepspeed", 0),
    "deepspeed, ZeRO 2": ("deepspeed", 2, "deepspeed", 2),
    "torchrun, FSDP2": ("torchrun", 2, "fsdp", 2),
    "deepspeed, ZeRO 3": ("deepspeed", 2, "deepspeed", 3),
}
CASES: dict[str, tuple[str, int, str, int]] = {ALONE: ("python", 1, "ddp", 0), **TOGETHER}

Runs = Mapping[str, tuple[Path, ScriptResult]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Work dir and result of every case."""
    folder = tmp_path_factory.mktemp("launchers")
    backbone = write_backbone(folder / "backbone.safetensors", 0)
    config = write_config(folder / "tiny.py", EPOCHS, backbone)
    work_dirs = {name: folder / f"run{number}" for number, name in enumerate(CASES)}
    launches = {}
    for name, (launcher, ranks, engine, zero_stage) in CASES.items():
        options = ["--engine", engine, "--cfg-options", f"engine.zero_stage={zero_stage}"]
        launches[name] = Launch(["train.py", config, "--work-dir", work_dirs[name], *options], launcher, ranks)
    results = run_all(launches)
    return {name: (work_dirs[name], results[name].check()) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_leaves_every_file(runs: Runs, case: str) -> None:
    work_dir, _ = runs[case]
    for name in ("task.safetensors", "plan.safetensors", "summary.json", "metrics.jsonl", "scores/scores.json"):
        assert (work_dir / name).is_file(), name
    pointer = work_dir / "checkpoints" / "latest"
    assert (pointer.parent / pointer.read_text(encoding="utf-8")).is_file()
    ranks = CASES[case][1]
    assert len(list((work_dir / "scores").glob("*.safetensors"))) == ranks
    # The default is to keep two.
    assert len(list((work_dir / "checkpoints").glob("*.safetensors"))) == 2
    assert not [path.name for path in work_dir.rglob(".*")], "temporary files are left"


@pytest.mark.parametrize("case", CASES)
def test_one_rank_reports(runs: Runs, case: str) -> None:
    work_dir, result = runs[case]
    reports = [line for line in result.stdout.splitlines() if line.startswith("task file ")]
    assert len(reports) == 1
    assert str(work_dir / "task.safetensors") in reports[0]
    assert result.error_lines == []


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_recorded_once(runs: Runs, case: str) -> None:
    work_dir, _ = runs[case]
    assert list(read_losses(work_dir)) == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    evaluated = [line["step"] for line in read_lines(work_dir) if "top1" in line]
    assert evaluated == [epochs * STEPS_PER_EPOCH for epochs in (2, 4, 6, 8)]


def test_run_is_worth_comparing(runs: Runs) -> None:
    """Every way of tuning occurs in the plan, and training does learn."""
    work_dir, _ = runs[ALONE]
    plan = read_plan(work_dir)
    assert plan.matrices and plan.vectors and plan.sparse and plan.parameters
    assert BUDGET - 200 < plan.num_trainable <= BUDGET
    losses = list(read_losses(work_dir).values())
    assert sum(losses[-7:]) < 0.9 * sum(losses[:7])
    # One of ten classes by guessing.
    assert read_summary(work_dir)["scores"]["top1"] > 0.2


@pytest.mark.parametrize("case", TOGETHER)
def test_same_losses(runs: Runs, case: str) -> None:
    """Step by step, with the gradient's norm and the learning rate."""
    assert_same_curve(runs[case][0], runs[ALONE][0])


@pytest.mark.parametrize("case", TOGETHER)
def test_same_plan(runs: Runs, case: str) -> None:
    assert_same_plan(runs[case][0], runs[ALONE][0])


@pytest.mark.parametrize("case", TOGETHER)
def test_same_task(runs: Runs, case: str) -> None:
    assert_same_task(runs[case][0], runs[ALONE][0])


@pytest.mark.parametrize("case", CASES)
def test_summary_agrees_with_files(runs: Runs, case: str) -> None:
    work_dir, _ = runs[case]
    summary, task = read_summary(work_dir), read_task(work_dir)
    trained = {name: values for name, values in task.items() if name.startswith("state/")}
    head = sum(values.numel() for name, values in trained.items() if name.startswith("state/head."))
    assert summary["num_head"] == head == 10 * (32 + 1)
    assert summary["num_trainable"] == sum(values.numel() for values in trained.values()) - head
    assert summary["method"] == "spt-lora"
    assert summary["scores"]["top1"] == [line["top1"] for line in read_lines(work_dir) if "top1" in line][-1]
    assert Path(summary["task_file"]) == work_dir / "task.safetensors"
