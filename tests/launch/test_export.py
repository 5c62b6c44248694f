"""Exports from the command line."""

import json
from collections.abc import Mapping
from pathlib import Path

# Must come before timm and peft: it makes torchvision importable beside a CPU build of torch.
import spt_dist  # noqa: F401  # isort: skip

import pytest
import timm
import torch
from torch import nn

from spt_dist import Plan, inject, load_delta, merge, save_delta
from spt_dist.config import load_config
from spt_dist.training.scoring import build_model
from spt_dist.tuning.export.peft import load_peft
from tests.launch.processes import Launch, ScriptResult, run_all
from tests.launch.runs import write_backbone, write_config
from tests.tuning.plans_for_tests import disturb, random_plan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, its backbone, and a task file as training would leave it."""
    folder = tmp_path_factory.mktemp("export")
    config = write_config(folder / "tiny.py", checkpoint=write_backbone(folder / "backbone.safetensors", seed=3))
    model = build_model(load_config(config))
    tuned = inject(model, random_plan(model, 1))
    disturb(tuned)
    save_delta(tuned, folder / "task.safetensors")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Mapping[str, ScriptResult]:
    """One launch for each format, and a folder that is not to be overwritten."""
    task, config = folder / "task.safetensors", folder / "tiny.py"
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    forms: dict[str, list[str]] = {"peft": ["peft"], "hf": ["hf"], "mine": ["hf"]}
    pictures = ["--cfg-options", "data._delete_=True", "data.type=image_folder", "data.root=nowhere"]
    forms["backbone's"] = ["hf", *pictures, "model.normalize=clip"]
    forms["data's"] = ["hf", *pictures, "model.normalize=clip", "data.transform=vtab_vpt"]
    return run_all(
        {
            name: Launch(["export.py", task, "--config", config, "--out", folder / name, "--format", *form])
            for name, form in forms.items()
        }
    )


def make_plain(folder: Path) -> nn.Module:
    """The config's model."""
    return build_model(load_config(folder / "tiny.py")).eval()


def test_a_peft_folder(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    printed = results["peft"].check().stdout
    tuned = load_delta(make_plain(folder), folder / "task.safetensors")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_peft(make_plain(folder), folder / "peft")(images), tuned(images))
    plan = tuned.spt_plan
    assert isinstance(plan, Plan)
    assert f"{plan.num_structured:,} of {plan.num_trainable:,}" in printed
    assert str(folder / "peft") in printed
    assert json.loads((folder / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_folder_for_timm(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    assert str(folder / "hf") in results["hf"].check().stdout
    merged = merge(load_delta(make_plain(folder), folder / "task.safetensors"))
    loaded = timm.create_model(f"local-dir:{folder / 'hf'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), merged(images))


def test_the_normalisation_of_the_run(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    """Which needs no data; timm's own of this ViT is 0.5 and 0.5."""
    wanted = {
        "backbone's": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711], "clip, mean 0.4815"),
        "data's": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "imagenet, mean 0.485"),
        "hf": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "timm's for the architecture"),
    }
    for name, (mean, std, words) in wanted.items():
        printed = results[name].check().stdout
        config = timm.create_model(f"local-dir:{folder / name}", pretrained=True).pretrained_cfg
        assert (list(config["mean"]), list(config["std"])) == (mean, std), name
        assert f"normalisation  {words}" in printed


def test_other_folders_stay_as_they_are(folder: Path, results: Mapping[str, ScriptResult]) -> None:
    refused = results["mine"]
    assert refused.rc == 2
    (line,) = refused.error_lines
    assert f"{folder / 'mine'}: holds other files than an earlier hf export" in line
    assert [path.name for path in (folder / "mine").iterdir()] == ["notes.txt"]
