"""Mistakes of a user: one line that names the thing, exit status 2, and no file written or changed."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spt_dist import Plan, inject, save_delta
from spt_dist.files import save_tensors
from spt_dist.models.classifier import build_classifier
from tests.launch.processes import Launch, ScriptResult, run_all, run_script, snapshot
from tests.launch.runs import MODEL_KWARGS, MODEL_NAME, STEPS_PER_EPOCH, write_backbone, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 2
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH


@dataclass(frozen=True)
class Mistake:
    """A command line, and what the error line has to say.

    Attributes:
        arguments: the script and its arguments, words apart; ``{here}`` is a folder of the case's own that holds a
            finished run as ``run`` and the damaged and foreign files of ``prepared``.
        message: regular expression, searched in the error line.
        launcher, ranks: as in ``run_script``.
    """

    arguments: str
    message: str
    launcher: str = "python"
    ranks: int = 1


TRAIN = "train.py {here}/tiny.py --work-dir {here}/new "
AGAIN = "train.py {here}/tiny.py --work-dir {here}/run "
OPTIONS = "--cfg-options "

MISTAKES = {
    "unknown key": Mistake(
        TRAIN + OPTIONS + "train.epoch=3", r"^error: config: train\.epoch is unknown; did you mean 'epochs'\?$"
    ),
    "options without value": Mistake(TRAIN + OPTIONS + "train.epochs", r"train\.epochs"),
    "no checkpoint": Mistake(
        TRAIN + OPTIONS + "model.checkpoint={here}/nowhere.safetensors", r"checkpoint='.*nowhere\.safetensors': no such"
    ),
    "model refuses argument": Mistake(TRAIN + OPTIONS + "model.kwargs.num_heads=5 model.checkpoint=None", r"num_heads"),
    "other image size": Mistake(TRAIN + OPTIONS + "data.image_size=32", r"32.*16|16.*32"),
    "budget above model": Mistake(
        TRAIN + OPTIONS + "method.budget=99999", r"budget=99999: above the backbone's [\d,]+ weights"
    ),
    "budget on two ranks": Mistake(
        TRAIN + OPTIONS + "method.budget=0", r"budget=0: .* at least 33$", launcher="torchrun", ranks=2
    ),
    "budget in a used work dir": Mistake(AGAIN + OPTIONS + "method.budget=0", r"budget=0: .* at least 33$"),
    "too many samples": Mistake(
        TRAIN + OPTIONS + "sensitivity.num_samples=999", r"num_samples=999, but the task has 201 samples"
    ),
    "work dir is a file": Mistake("train.py {here}/tiny.py --work-dir {here}/tiny.py", r"^error: .*tiny\.py"),
    "nothing to resume": Mistake(
        TRAIN + "--resume {here}/nowhere.safetensors", r"no checkpoint file .*nowhere\.safetensors"
    ),
    "truncated checkpoint": Mistake(
        TRAIN + f"--resume {{here}}/broken/checkpoints/step-{NUM_STEPS:08d}.safetensors",
        rf"step-{NUM_STEPS:08d}\.safetensors: not a read",
    ),
    "resume with other seed": Mistake(
        TRAIN + f"--resume {{here}}/run/checkpoints/step-{NUM_STEPS:08d}.safetensors {OPTIONS} seed=1",
        r"seed=0, this one has seed=1",
    ),
    "resume with other method": Mistake(
        TRAIN + f"--resume {{here}}/run/checkpoints/step-{NUM_STEPS:08d}.safetensors "
        f"{OPTIONS} method._delete_=True method.type=linear",
        r"written by a run with method\.\w+=.*, this one has method\.",
    ),
    "work dir can't be made": Mistake("train.py {here}/tiny.py --work-dir /proc/nowhere", r"/proc/nowhere"),
    "merge into a folder": Mistake(
        "merge.py {here}/run/task.safetensors --config {here}/tiny.py --out {here}/run", r"Is a directory: .*run"
    ),
    "merge into other backbone": Mistake(
        "merge.py {here}/run/task.safetensors --config {here}/tiny.py --out {here}/merged.safetensors "
        f"{OPTIONS} model.checkpoint={{here}}/other.safetensors",
        r"task\.safetensors: made for backbone vit_tiny_patch16_224 \(\w{12}\), .* with other weights",
    ),
    "merge truncated": Mistake(
        "merge.py {here}/task.safetensors --config {here}/tiny.py --out {here}/merged.safetensors",
        r"task\.safetensors: not a readable safetensors file",
    ),
    "merge adapters": Mistake(
        "merge.py {here}/adapter.safetensors --config {here}/tiny.py --out {here}/merged.safetensors",
        r"adapter\.safetensors: not all of it can be merged into a plain checkpoint",
    ),
    "scores of another model": Mistake(
        TRAIN + OPTIONS + "sensitivity.scores={here}/run/scores model.kwargs.depth=3 model.checkpoint=None",
        r"sensitivity\.scores=.*run/scores: scores of another model",
    ),
    "plan of another model": Mistake(
        TRAIN + OPTIONS + "method._delete_=True method.type=plan method.path={here}/run/plan.safetensors "
        "model.kwargs.embed_dim=64 model.checkpoint=None",
        r"plan: \S+ has shape \(.*\), this model's has \(.*\)",
    ),
    "unknown kind of module": Mistake(
        TRAIN + OPTIONS + "method.structured=scale", r"structured='scale': no such kind of module; choose one of lora"
    ),
    "prompts on windows": Mistake(
        TRAIN + OPTIONS + "method.structured=prompt model.name=swin_tiny_patch4_window7_224 model.checkpoint=None "
        "model.kwargs._delete_=True model.kwargs.img_size=16 model.kwargs.window_size=2",
        r"prompts for layers\.0\.blocks\.0, which is a SwinTransformerBlock",
    ),
    "evaluate other architecture": Mistake(
        "evaluate.py {here}/tiny.py --merged {here}/deeper.safetensors",
        r"deeper\.safetensors: does not fit this model \(.*blocks\.2",
    ),
    "report on nothing": Mistake(
        "report.py {here}/nowhere --out {here}/report", r"nowhere/summary\.json: no such file; .* holds no finished run"
    ),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run beside damaged and foreign files."""
    here = tmp_path_factory.mktemp("prepared")
    backbone = write_backbone(here / "backbone.safetensors", seed=0)
    write_backbone(here / "other.safetensors", seed=1)
    config = write_config(here / "tiny.py", EPOCHS, backbone)
    run_script(["train.py", config, "--work-dir", here / "run"]).check()
    checkpoint = here / "run" / "checkpoints" / f"step-{NUM_STEPS:08d}.safetensors"
    truncate(here / "run" / "task.safetensors", here / "task.safetensors")
    shutil.copytree(here / "run", here / "broken")
    truncate(checkpoint, here / "broken" / "checkpoints" / checkpoint.name)
    adapter = build_classifier(MODEL_NAME, 10, MODEL_KWARGS, str(backbone))
    plan = Plan(
        matrices={"blocks.0.attn.v.weight": "adapter"},
        shapes={"blocks.0.attn.v.weight": (32, 32)},
        head=["head.weight", "head.bias"],
    )
    save_delta(inject(adapter, plan), here / "adapter.safetensors")
    deeper = build_classifier(MODEL_NAME, 10, MODEL_KWARGS | {"depth": 3})
    save_tensors(here / "deeper.safetensors", deeper.state_dict(), {"kind": "merged", "model": MODEL_NAME})
    return here


def truncate(source: Path, target: Path) -> None:
    """Copy all but the last part of a file, as an interrupted transfer does."""
    content = source.read_bytes()
    target.write_bytes(content[: len(content) * 9 // 10])


@dataclass(frozen=True)
class Outcome:
    """How a mistake ended, and the case's files before and after."""

    result: ScriptResult
    before: dict[str, bytes]
    after: dict[str, bytes]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Mapping[str, Outcome]:
    """Every mistake made, two at a time, each in a copy of the prepared folder."""
    folders = {name: tmp_path_factory.mktemp("mistake") / "here" for name in MISTAKES}
    launches = {}
    for name, mistake in MISTAKES.items():
        shutil.copytree(prepared, folders[name])
        config = folders[name] / "tiny.py"
        write_config(config, EPOCHS, folders[name] / "backbone.safetensors")
        arguments = mistake.arguments.format(here=folders[name]).split()
        launches[name] = Launch(arguments, mistake.launcher, mistake.ranks)
    before = {name: snapshot(folder) for name, folder in folders.items()}
    results = run_all(launches)
    return {name: Outcome(results[name], before[name], snapshot(folders[name])) for name in MISTAKES}


@pytest.mark.parametrize("case", MISTAKES)
def test_one_line_says_what_is_wrong(outcomes: Mapping[str, Outcome], case: str) -> None:
    result, mistake = outcomes[case].result, MISTAKES[case]
    assert len(result.error_lines) == 1, result.stderr
    assert re.search(mistake.message, result.error_lines[0]), result.error_lines[0]
    if mistake.launcher == "python":
        # torchrun adds an account of its own.
        assert result.stderr.splitlines() == result.error_lines


@pytest.mark.parametrize("case", MISTAKES)
def test_exit_status(outcomes: Mapping[str, Outcome], case: str) -> None:
    result, mistake = outcomes[case].result, MISTAKES[case]
    if mistake.launcher == "torchrun":
        # torchrun ends with 1 whatever its processes ended with, and with SIGTERM for those that come second.
        assert result.rc == 1
        root_cause = result.stderr.partition("Root Cause")[2]
        assert re.search(r"exitcode +: 2 ", root_cause), result.stderr
    else:
        assert result.rc == 2, result.stderr


@pytest.mark.parametrize("case", MISTAKES)
def test_no_file_is_touched(outcomes: Mapping[str, Outcome], case: str) -> None:
    outcome = outcomes[case]
    assert sorted(outcome.after) == sorted(outcome.before)
    assert [name for name, content in outcome.before.items() if outcome.after[name] != content] == []


@pytest.mark.distributed
def test_line_is_printed_though_rank_zero_comes_last(tmp_path: Path) -> None:
    """A launcher ends all ranks as soon as one fails: the line must not depend on who reads the config first."""
    write_config(tmp_path / "tiny.py")
    config = tmp_path / "slow.py"
    # mmengine takes a config with `import` statements for another dialect.
    config.write_text(
        "_base_ = ['tiny.py']\n"
        "if __import__('os').environ['RANK'] == '0':\n"
        "    __import__('time').sleep(2)\n"
        "train = dict(epoch=3)\n",
        encoding="utf-8",
    )
    result = run_script(["train.py", config, "--work-dir", tmp_path / "new"], "torchrun", 2)
    assert result.rc != 0
    assert result.error_lines == ["error: config: train.epoch is unknown; did you mean 'epochs'?"], result.stderr


def test_diverging_run_names_the_step(tmp_path: Path) -> None:
    """A rate that is far too high is found at once; what was measured until then stays, and no task file is left."""
    work_dir = tmp_path / "work"
    options: list[Any] = ["--work-dir", work_dir, "--cfg-options", "train.lr=1e30"]
    result = run_script(["train.py", write_config(tmp_path / "tiny.py"), *options])
    assert result.rc == 2
    assert len(result.error_lines) == 1, result.stderr
    assert re.search(r"the loss is (nan|inf) at step \d+ .* lower train\.lr", result.error_lines[0])
    names = snapshot(work_dir)
    assert "metrics.jsonl" in names
    assert not {"task.safetensors", "summary.json", "checkpoints/latest"} & set(names)
