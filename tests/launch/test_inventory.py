"""What there is to tune in a model, from the command line."""

import os
from pathlib import Path

import pytest

from tests.launch.processes import ROOT, Launch, run_all

pytestmark = pytest.mark.slow


def test_by_name_and_by_config() -> None:
    results = run_all(
        {
            "name": Launch(["report.py", "--inventory", "convnext_base"]),
            "config": Launch(["report.py", "--inventory", "configs/quickstart/digits_lora.py"]),
            "unknown": Launch(["report.py", "--inventory", "convnext_bases"]),
            "nothing": Launch(["report.py", "--out", "nowhere"]),
        }
    )
    assert "87,566,464 weights outside the head, 0 of them left out" in results["name"].stdout
    assert "matrices: depthwise convolutions" in results["name"].stdout
    assert "blocks.attn.q.weight" in results["config"].stdout
    assert "timm has no such model" in results["unknown"].stderr
    assert "PATH and --out are required, or --inventory alone" in results["nothing"].stderr
    assert [results[name].rc for name in ("name", "config", "nothing")] == [0, 0, 2]


MODULE = """\
import timm

@timm.models.register_model
def vit_of_ones_own(pretrained=False, num_classes=10, **kwargs):
    sizes = dict(embed_dim=24, depth=1, num_heads=2)
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **sizes)
"""


def test_a_model_section_is_enough_and_modules_come_first(tmp_path: Path) -> None:
    (tmp_path / "ones_own.py").write_text(MODULE)
    (tmp_path / "two.py").write_text('data = dict(type="digits")')
    swin, name = "configs/_base_/models/swin-b_in22k.py", "vit_of_ones_own"
    results = run_all(
        {
            "backbone": Launch(["report.py", "--inventory", swin]),
            "own": Launch(
                ["report.py", "--inventory", name, "--import", "ones_own"],
                env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
            ),
            "no model": Launch(["report.py", "--inventory", tmp_path / "two.py"]),
        }
    )
    assert "86,743,224 weights outside the head, 0 of them left out" in results["backbone"].check().stdout
    # Patches, class token, positions; norms, attention, MLP; the last norm.
    weights = (768 + 1) * 24 + (1 + 197) * 24 + (48 + 25 * 72 + 25 * 24 + 48 + 25 * 96 + 97 * 24) + 48
    assert f"{name}\ninventory: {weights:,} weights outside the head" in results["own"].check().stdout
    (line,) = results["no model"].error_lines
    assert f"{tmp_path / 'two.py'}: has no section model=dict(...)" in line
    assert results["no model"].rc == 2


def test_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    beside = {"PATH": [str(tmp_path)], "--out": ["--out", str(tmp_path / "out")]}
    results = run_all(
        {name: Launch(["report.py", *options, "--inventory", "convnext_base"]) for name, options in beside.items()}
    )
    for name, result in results.items():
        assert result.rc == 2
        assert result.error_lines == [
            f"error: --inventory convnext_base: prints a table and reads no results; leave {name} out"
        ]
        assert not result.stdout
