"""The paper's Tables 1, 2 and 4 as suites: what is trained, and its share of the backbone against the printed one."""

from functools import cache
from pathlib import Path

import pytest
import torch

from spt_dist.config import read_values
from spt_dist.data.lists.fgvc import FGVC_SETS
from spt_dist.data.lists.vtab import VTAB_TASKS
from spt_dist.models.classifier import create_model
from spt_dist.report.published import PUBLISHED, PUBLISHED_TASKS, Published
from spt_dist.report.suites import group_mean
from spt_dist.sections import ModelConfig, RunConfig
from spt_dist.suites import load_suite
from spt_dist.training.pipeline import check_config
from spt_dist.tuning.methods import make_plan
from tests.launch.processes import ROOT

PAPER = ROOT / "configs" / "paper"
SUITES = sorted(path.stem for path in PAPER.glob("[!_]*.py"))
VTAB_GROUPS = {
    group: [name for name, task in VTAB_TASKS.items() if task.group == group]
    for group in ("natural", "specialized", "structured")
}
# Table and backbone -> `suite.published`, the backbone's config, its weights, and the width that its head reads.
TABLES = {
    "table1_vtab": ("vtab", "vit-b16_in21k", 85_798_656, 768),
    "table1_fgvc": ("fgvc", "vit-b16_in21k", 85_798_656, 768),
    "table2_mae": ("vtab_mae", "vit-b16_mae", 85_798_656, 768),
    "table2_mocov3": ("vtab_mocov3", "vit-b16_mocov3", 85_798_656, 768),
    "table4_swin-b": ("vtab_swin-b", "swin-b_in22k", 86_743_224, 1024),
    "table4_convnext-b": ("vtab_convnext-b", "convnext-b_in22k", 87_566_464, 1024),
}
# Of each stage: blocks and width.
STAGES = {
    "swin-b": [(2, 128), (2, 256), (18, 512), (2, 1024)],
    "convnext-b": [(3, 128), (3, 256), (27, 512), (3, 1024)],
}
VIT_B = [(12, 768)]

# How the paper seems to have counted a printed share. The text says that FGVC has 55 to 200 classes: NABirds' 555 were
# taken for 55 in some rows.
WITH_HEAD, WITHOUT_HEAD, WITH_55, UNEXPLAINED = "with the head", "without the head", "NABirds with 55 classes", "?"
READINGS = {
    ("table1_vtab", "full"): WITHOUT_HEAD,
    ("table1_vtab", "linear"): WITH_HEAD,
    # 0.12 without and 0.16 with the head; printed is 0.13, as for FGVC.
    ("table1_vtab", "bias"): UNEXPLAINED,
    # 8.26 without and 8.31 with the head; printed is 8.30.
    ("table1_vtab", "partial-1"): UNEXPLAINED,
    # VPT chose a number of prompts for each task; ours is the one that gives the printed share, with the head.
    ("table1_vtab", "vpt-deep"): WITH_HEAD,
    ("table1_vtab", "adapter-8"): WITH_HEAD,
    # 0.70 without and 0.74 with the head; printed is 0.71.
    ("table1_vtab", "adapter-32"): UNEXPLAINED,
    # 0.34 without and 0.39 with the head; what is printed, 0.23, is ADAPTER-8's share.
    ("table1_vtab", "lora-8"): UNEXPLAINED,
    ("table1_vtab", "lora-16"): WITHOUT_HEAD,
    ("table1_fgvc", "full"): WITHOUT_HEAD,
    ("table1_fgvc", "linear"): WITH_55,
    ("table1_fgvc", "bias"): UNEXPLAINED,
    ("table1_fgvc", "partial-1"): WITH_55,
    ("table1_fgvc", "vpt-deep"): WITH_HEAD,
    ("table1_fgvc", "adapter-8"): WITH_HEAD,
    # 0.91 with the head; printed is 0.95.
    ("table1_fgvc", "adapter-32"): UNEXPLAINED,
    ("table1_fgvc", "lora-8"): WITH_HEAD,
    ("table1_fgvc", "lora-16"): WITH_HEAD,
}
# Shares of other tables' peers are not known here.
PEERS = [name for name in SUITES if "spt" not in name]


def split(suite: str) -> tuple[str, str]:
    """The table with its backbone, and the row."""
    table, backbone, row = suite.split("_", maxsplit=2)
    return f"{table}_{backbone}", row


@cache
def first_member(suite: str) -> RunConfig:
    """Members differ in task and classes only."""
    first = "cub" if "fgvc" in suite else "cifar"
    return load_suite(PAPER / f"{suite}.py", {}, None, [first]).members[0].config


def published_row(suite: str) -> Published | None:
    """What the paper has for a suite; ``None`` where the number is not known."""
    table, row = split(suite)
    # "spt-lora_0.63", "lora-16", "full"
    method, mark, size = row.partition("_" if row.startswith("spt") else "-")
    ending = f" {size} %" if mark == "_" else mark + size
    rows = PUBLISHED[TABLES[table][0]].get(method, ())
    return next((each for each in rows if each.label.endswith(ending)), None)


def mean_head(table: str) -> float:
    """Weights of a head, over the tasks' mean."""
    known = {name: task.num_classes for name, task in (FGVC_SETS if "fgvc" in table else VTAB_TASKS).items()}
    return (TABLES[table][3] + 1) * sum(known.values()) / len(known)


def by_hand(table: str, row: str) -> int:
    """Trained weights without the head, of methods that are the same in every block."""
    backbone = table.split("_")[1]
    stages = STAGES.get(backbone, VIT_B)
    kind, _, size = row.partition("-")
    if kind == "full":
        return TABLES[table][2]
    if kind == "bias":
        # Of a block: norm1, query, key and value, proj, norm2, fc1 and fc2; outside the blocks: patches and final norm.
        return 12 * 768 * (1 + 3 + 1 + 1 + 4 + 1) + 2 * 768
    if kind == "partial":
        norms, attention, mlp = 2 * 2 * 768, 4 * (768 + 1) * 768, (768 + 1) * 3072 + (3072 + 1) * 768
        return int(size) * (norms + attention + mlp) + 2 * 768
    if kind == "vpt":
        return 12 * 768 * (72 if "fgvc" in table else 102)
    if kind == "adapter":
        rank = int(size)
        return sum(blocks * (2 * width * rank + rank + width) for blocks, width in stages)
    if kind == "lora":
        # Queries and values; in ConvNeXt, which has none, both layers of the MLP, from C to 4 C and back.
        pairs = 10 if backbone == "convnext-b" else 4
        return sum(blocks * pairs * width * int(size) for blocks, width in stages)
    assert kind == "linear"
    return 0


def test_every_row_has_a_suite() -> None:
    """And no suite has no row, but for what the numbers of the peers could not be had of."""
    rows = [row for suite in SUITES if (row := published_row(suite)) is not None]
    assert sorted(row.label for row in rows) == sorted(
        row.label for table in PUBLISHED.values() for of_method in table.values() for row in of_method
    )
    assert {suite for suite in SUITES if published_row(suite) is None} == {
        f"{table}_{row}" for table in TABLES if "table1" not in table for row in ("full", "linear")
    }


@pytest.mark.parametrize("suite", SUITES)
def test_suites_are_of_their_backbone_and_all_its_tasks(suite: str) -> None:
    table, row = split(suite)
    published, backbone, _, _ = TABLES[table]
    loaded = load_suite(PAPER / f"{suite}.py", {}, None, ["cub" if "fgvc" in suite else "cifar"])
    tasks = [name for group in loaded.groups.values() for name in group]
    assert sorted(tasks) == sorted(PUBLISHED_TASKS[published])
    assert loaded.groups == ({"fgvc": list(FGVC_SETS)} if "fgvc" in table else VTAB_GROUPS)
    assert loaded.published == published
    config = first_member(suite)
    check_config(config)
    model = read_values(ROOT / "configs" / "_base_" / "models" / f"{backbone}.py")["model"]
    # As SPT's and VPT's code feed every backbone.
    model["normalize"] = "imagenet"
    assert config.model == ModelConfig(num_classes=200 if "fgvc" in table else 100, **model)
    assert config.data.get("normalize") is None
    assert config.method["type"] == ("spt" if "spt" in row else row.split("-")[0])


def test_the_tasks_are_those_of_the_benchmarks_own_suites() -> None:
    for table, folder in (("_vtab.py", "vtab"), ("_table1_fgvc.py", "fgvc")):
        own = read_values(ROOT / "configs" / folder / "all.py")["suite"]["groups"]
        wanted = {group: [f"../{folder}/{file}" for file in files] for group, files in own.items()}
        assert read_values(PAPER / table)["suite"]["groups"] == wanted


def test_heads_are_as_large_as_they_are() -> None:
    """By hand: 940 and 1,173 classes, of 19 and 5 tasks."""
    assert mean_head("table1_vtab") == pytest.approx(769 * 940 / 19)
    assert mean_head("table1_fgvc") == pytest.approx(769 * 1173 / 5)
    assert mean_head("table4_swin-b") == pytest.approx(1025 * 940 / 19)


@pytest.mark.parametrize("suite", PEERS)
def test_what_is_trained_is_what_is_counted_by_hand(suite: str) -> None:
    table, row = split(suite)
    config = first_member(suite)
    options = {key: value for key, value in config.method.items() if key != "type"}
    model = create_model(config.model.name, 100, config.model.kwargs, torch.device("meta"))
    plan = make_plan(config.method["type"], model, **options)
    assert plan.num_trainable == by_hand(table, row)
    assert plan.backbone_size == TABLES[table][2]


@pytest.mark.parametrize(("table", "row"), READINGS)
def test_printed_shares(table: str, row: str) -> None:
    """Each printed share is read in the one way that gives it, and in none where it is a slip."""
    own, head, size = by_hand(table, row), mean_head(table), TABLES[table][2]
    ways = {WITH_HEAD: own + head, WITHOUT_HEAD: own}
    if "fgvc" in table:
        ways[WITH_55] = own + 769 * (1173 - 500) / 5
    shares = {way: round(100 * number / size, 2) for way, number in ways.items()}
    published = published_row(f"{table}_{row}")
    assert published is not None
    reading = READINGS[table, row]
    if reading == UNEXPLAINED:
        assert published.share not in shares.values()
    else:
        assert shares[reading] == published.share


def test_every_printed_share_is_read() -> None:
    printed = {split(suite) for suite in PEERS if (row := published_row(suite)) is not None and row.share is not None}
    assert printed == set(READINGS)


def test_the_slips_are_what_they_are_said_to_be() -> None:
    (eight, thirty_two), (lora_8, _) = PUBLISHED["vtab"]["adapter"], PUBLISHED["vtab"]["lora"]
    assert lora_8.share == eight.share
    (bias,), (partial,), (linear,) = (PUBLISHED["vtab"][method] for method in ("bias", "partial", "linear"))
    assert bias.share == PUBLISHED["fgvc"]["bias"][0].share
    # Printed in between, as if neither rounded nor counted alike.
    size, head = 85_798_656, mean_head("table1_vtab")
    for row, published in (("adapter-32", thirty_two), ("bias", bias), ("partial-1", partial)):
        own = by_hand("table1_vtab", row)
        assert published.share is not None
        assert own / size < published.share / 100 < (own + head) / size
    assert linear.share is not None
    assert partial.share == round(round(100 * own / size, 2) + linear.share, 2)


@pytest.mark.parametrize("suite", [suite for suite in SUITES if "spt" in suite])
def test_budgets_are_the_printed_shares_without_the_head(suite: str) -> None:
    table, row = split(suite)
    published = published_row(suite)
    assert published is not None
    assert published.share is not None
    assert row.endswith(f"{published.share:.2f}")
    method = first_member(suite).method
    total = method["budget"] + mean_head(table)
    assert 100 * total / TABLES[table][2] == pytest.approx(published.share, abs=2e-6)
    assert method["structured"] == row.partition("_")[0].removeprefix("spt-")
    assert (method["rank"], method["alpha"], method["beta"]) == (8, 10.0, 5.0)


ROWS_BY_TASK = [row for rows in PUBLISHED["vtab"].values() for row in rows if row.tasks]


@pytest.mark.parametrize("row", ROWS_BY_TASK, ids=lambda row: row.label)
def test_rows_by_task_give_their_printed_means(row: Published) -> None:
    """Where retinopathy can't be read, the mean says what it was, to half a percent: much the same in every row."""
    known = row.tasks.get("diabetic_retinopathy")
    candidates = [value / 10 for value in range(1001)] if known is None else [known]
    means = {value: group_mean({**row.tasks, "diabetic_retinopathy": value}, VTAB_GROUPS) for value in candidates}
    assert row.mean is not None
    found = [value for value, mean in means.items() if mean is not None and abs(mean - row.mean) <= 0.05]
    assert found
    assert 65 < min(found) <= max(found) < 80


def test_each_suite_writes_where_no_other_does() -> None:
    folders = {str(Path(first_member(suite).work_dir).parent) for suite in SUITES}
    assert len(folders) == len(SUITES)
