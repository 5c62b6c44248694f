"""The other scripts, and how their files go together."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

# Must come before timm: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # noqa: F401  # isort: skip

import numpy as np
import pytest
import timm
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from spt_dist import Plan, Scores
from spt_dist.data.digits import build_digits
from spt_dist.report.patterns import find_patterns
from spt_dist.report.plans import tabulate_plans
from tests.launch.processes import ROOT, Launch, ScriptResult, run_all
from tests.launch.runs import (
    BUDGET,
    MODEL_KWARGS,
    MODEL_NAME,
    NUM_TRAIN,
    read_plan,
    read_summary,
    read_task,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("[!_]*.py"))
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PATTERNS = ("scores{}.png", "patterns_blocks{}.png", "patterns_operations{}.png", "patterns_density{}.png")
RUN_PICTURES = tuple(name.format(f"_{run}") for name in (*PATTERNS, "allocation{}.png") for run in ("own", "saved"))
BUDGETS = (0.1, BUDGET)
PLAN_PICTURES = ("plans.png", *(f"plan_budget_{budget}.png" for budget in BUDGETS))
PICTURES = (
    *(f"report/{name}" for name in ("losses.png", *RUN_PICTURES)),
    *(f"scores/{name.format('')}" for name in PATTERNS),
    *(f"scores/plans/{name}" for name in PLAN_PICTURES),
    *(f"patterns/{name.format('_scores')}" for name in PATTERNS),
    *(f"plans/{name}" for name in ("plans.png", "plan_task.png", "plan_budget_0.1.png", "plan_scale.png")),
    "later/plans/plan.png",
)


def write_own_kind(folder: Path) -> Path:
    """A module that registers a kind of structured module, and the plan file that it returns, which has one of them."""
    text = """from spt_dist import StructuredModule, register_structured
register_structured("scale", cost=lambda shape, rank: shape[0])(StructuredModule)
"""
    (folder / "own_kind.py").write_text(text, encoding="utf-8")
    name = "blocks.0.attn.q.weight"
    plan = Plan({name: "scale"}, shapes={name: (32, 32)}, rank=5, backbone_size=1000)
    plan.save(folder / "scale.safetensors")
    return folder / "scale.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scripts of this module work."""
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def results(folder: Path) -> Mapping[str, ScriptResult]:
    """Every script once, in the order of a user's work; side by side where the files allow it.

    ``own`` is a run that scores for itself, ``saved`` one that takes the scores of two ranks of ``sensitivity.py``, and
    ``planned`` one that takes its plan.
    """
    config, task, merged = write_config(folder / "tiny.py"), folder / "own" / "task.safetensors", folder / "merged"
    wanted = ["--tau", "0.05", "--tau", "100", *(word for budget in BUDGETS for word in ("--budget", str(budget)))]
    use_scores = ["--cfg-options", f"sensitivity.scores={folder / 'scores'}"]
    plan = folder / "scores" / "plans" / f"budget_{BUDGET}.safetensors"
    use_plan = ["--cfg-options", "method._delete_=True", "method.type=plan", f"method.path={plan}"]
    import_own_kind = ["--import", "own_kind", "--out", folder / "plans"]
    steps: list[dict[str, Launch]] = [
        {
            "sensitivity": Launch(["sensitivity.py", config, "--out", folder / "scores", *wanted], "torchrun", 2),
            "own": Launch(["train.py", config, "--work-dir", folder / "own"]),
        },
        {
            "saved": Launch(["train.py", config, "--work-dir", folder / "saved", *use_scores]),
            "planned": Launch(["train.py", config, "--work-dir", folder / "planned", *use_plan]),
            "merge": Launch(["merge.py", task, "--config", config, "--out", merged]),
            "later": Launch(["sensitivity.py", config, "--out", folder / "later", "--budget", "0.1", *use_scores]),
        },
        {
            "evaluate task": Launch(["evaluate.py", config, "--task", task]),
            "evaluate merged": Launch(["evaluate.py", config, "--merged", merged], "torchrun", 2),
            "report": Launch(["report.py", folder / "own", folder / "saved", "--out", folder / "report"]),
            "patterns": Launch(["report.py", folder / "scores", "--out", folder / "patterns", "--tau", "100"]),
            "plans": Launch(
                ["report.py", task, plan.with_name("budget_0.1.safetensors"), write_own_kind(folder), *import_own_kind],
                env={"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
            ),
        },
    ]
    done: dict[str, ScriptResult] = {}
    for launches in steps:
        done |= run_all(launches)
        for result in done.values():
            result.check()
    return done


@pytest.fixture(scope="module")
def helps() -> Mapping[str, ScriptResult]:
    """``--help`` of every script."""
    return run_all({name: Launch([name, "--help"]) for name in SCRIPTS})


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_ends_with_an_example(helps: Mapping[str, ScriptResult], script: str) -> None:
    text = helps[script].check().stdout
    assert text.startswith("usage:")
    example = text.partition("example:\n")[2].strip()
    assert f"launch/{script}" in example
    # What the example names is there, but for what the example before it would have made.
    configs = re.findall(r"configs/\S+\.py", example)
    assert all((ROOT / path).is_file() for path in configs)


@pytest.mark.distributed
def test_saved_scores_give_the_same_plan(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    own, saved = read_plan(folder / "own"), read_plan(folder / "saved")
    assert saved.matrices == own.matrices
    assert saved.vectors == own.vectors
    assert saved.sparse.keys() == own.sparse.keys()
    assert all(torch.equal(saved.sparse[name], indices) for name, indices in own.sparse.items())
    assert len(list((folder / "scores").glob("*.safetensors"))) == 2
    assert f"sensitivity.scores={folder / 'scores'}" in results["sensitivity"].stdout


@pytest.mark.distributed
def test_saved_scores_give_the_same_run(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    """Once the plan is the same nothing else depends on where the scores came from."""
    own, saved = read_task(folder / "own"), read_task(folder / "saved")
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], values) for name, values in own.items())


@pytest.mark.distributed
def test_a_sweeps_plan_gives_the_same_run(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    """That of the config's own budget, allocated on two ranks and trained as the script says."""
    saved, planned = read_task(folder / "saved"), read_task(folder / "planned")
    assert planned.keys() == saved.keys()
    assert all(torch.equal(planned[name], values) for name, values in saved.items())
    said = (
        f"method._delete_=True method.type=plan method.path={folder / 'scores/plans' / f'budget_{BUDGET}.safetensors'}"
    )
    assert said in results["sensitivity"].stdout


@pytest.mark.distributed
def test_sweeps_of_the_pass_and_of_its_saved_scores_agree(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    plans = {budget: Plan.load(folder / "scores/plans" / f"budget_{budget}.safetensors") for budget in BUDGETS}
    assert tabulate_plans({f"budget_{budget}": plan for budget, plan in plans.items()}) in results["sensitivity"].stdout
    later = Plan.load(folder / "later" / "plans" / "budget_0.1.safetensors")
    (tensors, metadata), (later_tensors, later_metadata) = plans[0.1].to_tensors(), later.to_tensors()
    assert later_metadata == metadata
    assert all(torch.equal(later_tensors[name], indices) for name, indices in tensors.items())
    # The scores stay where they are.
    assert not list((folder / "later").glob("scores*.safetensors"))
    assert f"sensitivity.scores={folder / 'scores'}" in results["later"].stdout


@pytest.mark.distributed
def test_plans_table(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    text = (folder / "plans" / "report.txt").read_text(encoding="utf-8")
    for name, plan in {
        "task": read_plan(folder / "own"),
        "budget_0.1": Plan.load(folder / "scores" / "plans" / "budget_0.1.safetensors"),
    }.items():
        assert f"{name}: {plan.summary()}" in text
        row = [line for line in text.splitlines() if line.startswith(f"│ {name} ")][-1]
        assert f"{plan.num_trainable:,}" in row
        assert row in results["plans"].stdout
    assert re.search(r"│ scale +│ +spt │ +32 │ +3\.200% │ +0 │ +1 \(r5\) │ +0 │ +0 │ +0 │", results["plans"].stdout)


@pytest.mark.distributed
def test_evaluations_agree(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    """Of the run itself, of the task file on its backbone, and of the merged checkpoint."""
    wanted = f"{read_summary(folder / 'own')['scores']['top1']:.2%}"
    for name in ("evaluate task", "evaluate merged"):
        assert re.findall(r"^top-1 +(\S+)$", results[name].stdout, re.MULTILINE) == [wanted], name
        assert re.findall(r"^held-out samples +(\d+)$", results[name].stdout, re.MULTILINE) == [str(1797 - NUM_TRAIN)]


def test_merged_file_is_a_plain_timm_checkpoint(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    """It loads without our package's help, and has the run's accuracy by a plain loop."""
    model = timm.create_model(MODEL_NAME, num_classes=10, **MODEL_KWARGS).eval()
    model.load_state_dict(load_file(folder / "merged"), strict=True)
    task = build_digits(image_size=16, num_train=NUM_TRAIN)
    with torch.no_grad():
        hits = [
            bool(model(image.unsqueeze(0)).argmax() == label) for image, label in (task.val[i] for i in range(1596))
        ]
    top1 = read_summary(folder / "own")["scores"]["top1"]
    assert top1 > 0.2, "by guessing it is 0.1"
    assert np.mean(hits) == pytest.approx(top1, abs=1 / 1596)


def test_report_table(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    text = (folder / "report" / "report.txt").read_text(encoding="utf-8")
    for name in ("own", "saved"):
        summary = read_summary(folder / name)
        (row,) = [line for line in text.splitlines() if f"SPT-LoRA ({name})" in line]
        assert f"{summary['num_trainable']:,}" in row
        assert f"{100 * summary['scores']['top1']:.2f}" in row
        assert row in results["report"].stdout


@pytest.mark.distributed
def test_patterns_of_two_ranks_are_those_of_the_saved_scores(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    scores = Scores.load(folder / "scores")
    assert find_patterns(scores, [0.05, 100]).table() in results["sensitivity"].stdout
    assert find_patterns(scores, [100]).table() in results["patterns"].stdout
    both = json.loads((folder / "scores" / "patterns.json").read_text(encoding="utf-8"))
    later = json.loads((folder / "patterns" / "patterns_scores.json").read_text(encoding="utf-8"))
    assert both["taus"][0] == 100 == sum(tensor["sensitive"][0] for tensor in both["tensors"])
    assert later["taus"] == [100]
    for tensor, same in zip(both["tensors"], later["tensors"], strict=True):
        assert tensor == same | {"sensitive": tensor["sensitive"]}
        assert tensor["sensitive"][0] == same["sensitive"][0]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(folder: Path, results: Mapping[str, ScriptResult], name: str) -> None:
    path = folder / name
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    pixels_HWC = imread(path)
    height, width = pixels_HWC.shape[:2]
    assert height > 200 and width > 200
    # More than an empty page.
    assert len(np.unique(pixels_HWC[..., :3].reshape(-1, 3), axis=0)) > 10


def test_reports_name_their_files(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    for script in ("report", "patterns", "plans", "later"):
        for path in (folder / script).rglob("*.*"):
            assert str(path) in results[script].stdout
    for path in (folder / "scores" / "plans").iterdir():
        assert str(path) in results["sensitivity"].stdout
    assert {path.name for path in (folder / "report").iterdir()} == {
        "report.txt",
        "losses.png",
        "patterns_own.json",
        "patterns_saved.json",
        *RUN_PICTURES,
    }
    for name in ("patterns.json", *PATTERNS):
        assert str(folder / "scores" / name.format("")) in results["sensitivity"].stdout
