"""How few GPUs will do, against the dry run's figures one by one, and against a search through them."""

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import gpu_needs
from gpu_needs import (
    COLORS,
    COLUMNS,
    ENGINES,
    METHODS,
    RANKS,
    SAVINGS,
    SETR,
    Need,
    detailed_table,
    draw_needs,
    draw_panel,
    fewest,
    fewest_of_any,
    find_needs,
    make_setups,
    report,
    summary_table,
)
from spt_dist.sections import EngineConfig, ModelConfig, RunConfig, SensitivityConfig, TrainConfig
from spt_dist.training.dry_run import GIB
from spt_dist.training.pipeline import check_config, plan_dry

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 1, "num_heads": 3, "mlp_ratio": 2.0}
# Ten samples are scored: four of a rank on one and on two, two of a rank on five.
SAMPLES, SCORED = 4, 10
FEW_RANKS = (2, 1, 5)
TINY_METHODS: dict[str, dict[str, Any]] = {
    "SPT-LoRA": {"type": "spt", "budget": 4096, "rank": 4},
    "LoRA": {"type": "lora", "rank": 4},
    "full": {"type": "full"},
}
ROWS = (("SPT-LoRA", "fp32"), ("LoRA", "amp + checkpointing"), ("full", "fp32"))
# Method, what saves memory, engine, ranks.
Case = tuple[str, str, str, int]
AllNeeds = dict[Case, Need]


def tiny(method: str, **sections: Any) -> RunConfig:
    standard = {
        "train": TrainConfig(epochs=1, batch_size=SAMPLES),
        "sensitivity": SensitivityConfig(batch_size=SAMPLES, num_samples=SCORED),
    }
    return RunConfig(
        model=ModelConfig(name="vit_tiny_patch16_224", num_classes=10, kwargs=SMALL),
        data={"type": "digits"},
        method=TINY_METHODS[method],
        **(standard | sections),
    )


def planned(method: str, saving: str, engine: str, ranks: int) -> int:
    """The dry run's own figure for one case."""
    words = saving.split(" + ")
    engines = {
        "ddp": {"type": "ddp"},
        "fsdp": {"type": "fsdp"},
        "ZeRO 2": {"type": "deepspeed", "zero_stage": 2},
        "ZeRO 3": {"type": "deepspeed", "zero_stage": 3},
    }
    config = tiny(
        method,
        train=TrainConfig(epochs=1, batch_size=ranks * SAMPLES),
        sensitivity=SensitivityConfig(
            batch_size=SAMPLES,
            num_samples=SCORED,
            dtype="bfloat16" if "amp" in words else None,
            memory_limit_gib=1.0 if "checkpointing" in words else None,
        ),
        engine=EngineConfig(**engines[engine], amp="amp" in words, activation_checkpointing="checkpointing" in words),
    )
    found = plan_dry(config, ranks)
    assert found.samples == SAMPLES
    return found.peak


@pytest.fixture(scope="module")
def needs() -> AllNeeds:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_needs, "RANKS", FEW_RANKS)
        return {
            (method, saving, *case): need
            for method, saving in ROWS
            for case, need in find_needs(tiny(method), saving).items()
        }


@pytest.fixture(scope="module")
def peaks() -> dict[Case, int]:
    return {(*row, *case): planned(*row, *case) for row, *case in product(ROWS, ENGINES, FEW_RANKS)}


def test_figures_are_those_of_the_dry_run(needs: AllNeeds, peaks: dict[Case, int]) -> None:
    assert {case: needs[case].peak for case in peaks} == peaks


@pytest.mark.parametrize("saving", ["amp", "checkpointing", "amp + checkpointing"])
def test_each_saving_is_what_it_says(monkeypatch: pytest.MonkeyPatch, saving: str) -> None:
    monkeypatch.setattr(gpu_needs, "RANKS", (1,))
    assert find_needs(tiny("SPT-LoRA"), saving)["ddp", 1].peak == planned("SPT-LoRA", saving, "ddp", 1)


def test_scoring_counts_and_shares_its_samples_out(needs: AllNeeds) -> None:
    scoring = {ranks: needs["SPT-LoRA", "fp32", "ddp", ranks].scoring for ranks in FEW_RANKS}
    assert scoring[1] == scoring[2] > scoring[5]
    assert all((need.scoring > 0) == (case[0] == "SPT-LoRA") for case, need in needs.items())


def test_more_ranks_need_no_more_of_each(needs: AllNeeds) -> None:
    for (method, saving), engine in product(ROWS, ENGINES):
        # On one there is nothing to send, and nothing is borrowed.
        two, five = (needs[method, saving, engine, ranks] for ranks in (2, 5))
        assert five.training == two.training if engine == "ddp" else five.training < two.training
    full = {ranks: needs["full", "fp32", "ddp", ranks].training for ranks in FEW_RANKS}
    assert full[1] < full[2], "DDP's buckets"


def test_fewest_by_a_search(needs: AllNeeds, peaks: dict[Case, int]) -> None:
    """For every limit around every figure of the dry run."""
    for method, saving in ROWS:
        own = {case[2:]: peak for case, peak in peaks.items() if case[:2] == (method, saving)}
        found = {case[2:]: need for case, need in needs.items() if case[:2] == (method, saving)}
        before: dict[str, float] = {}
        for limit in sorted({peak + more for peak in own.values() for more in (-1, 0, 1)}):
            expected: dict[str, int] = {}
            for engine in ENGINES:
                for ranks in sorted(FEW_RANKS, reverse=True):
                    if own[engine, ranks] <= limit:
                        expected[engine] = ranks
                counts = {ranks: need.peak for (name, ranks), need in found.items() if name == engine}
                assert fewest(counts, limit) == expected.get(engine)
                # More memory never takes more of them.
                assert expected.get(engine, 99) <= before.get(engine, 99)
            before = {**before, **expected}
            best = fewest_of_any(found, limit)
            trusted = [expected[engine] for engine in ("ddp", "ZeRO 2", "fsdp") if engine in expected]
            if trusted:
                assert best is not None and best[0] == min(trusted)
                first = next(name for name in ("ddp", "ZeRO 2", "fsdp") if expected.get(name) == min(trusted))
                assert best[1] == first
            else:
                assert best is None


def test_fewest_is_no_matter_of_order() -> None:
    """One GPU may do where two, which have to send, don't."""
    assert fewest({8: 5, 1: 10, 2: 12, 4: 9}, 10) == 1
    assert fewest({8: 5, 1: 10, 2: 12, 4: 9}, 9) == 4
    assert fewest({8: 5, 1: 10}, 4) is None
    low = {("ZeRO 3", 1): Need(0, 1), ("ddp", 1): Need(0, 9), ("ZeRO 2", 1): Need(9, 9), ("fsdp", 1): Need(0, 5)}
    assert fewest_of_any(low, 4) is None, "ZeRO 3's figure is too low"
    assert fewest_of_any(low, 5) == (1, "fsdp")
    assert fewest_of_any(low, 9) == (1, "ddp")


def by_hand() -> dict[tuple[str, str, str], dict[tuple[str, int], Need]]:
    """14 GiB to train, 14 and a byte to score on one; on more fsdp needs less. With savings all need 1 GiB."""
    gib = {
        (engine, ranks): Need(14 * GIB + 1, 14 * GIB) if engine != "fsdp" or ranks < 4 else Need(0, 14 * GIB)
        for engine, ranks in product(ENGINES, RANKS)
    }
    large = {case: Need(0, 100 * GIB) for case in gib}
    results = {("A", "small", saving): {case: Need(0, GIB) for case in gib} for saving in SAVINGS}
    results |= {("A", "large", saving): large for saving in SAVINGS}
    return results | {("A", "small", "fp32"): gib}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_tables() -> None:
    results = by_hand()
    small, large = (line for line in summary_table(results, 2).splitlines() if "A, " in line)
    # 16 GiB without 2 are 14: enough for fsdp on four, a byte too few for the others. With all savings one does.
    assert cells(small) == ["A, small", "4 fsdp / 1", "1", "1", "1"]
    assert cells(large) == ["A, large", "-", "-", "-", "-"]
    assert "A, small │      1 │" in summary_table(results, 1.5)
    lines = detailed_table(results, "fp32", 2).splitlines()
    rows = {cells(line)[0]: cells(line)[1:] for line in lines if "A, " in line}
    assert rows["A, small, ddp"] == ["14.0*"] * 6 + ["-", "1", "1", "1"]
    assert rows["A, small, fsdp"] == ["14.0*"] * 2 + ["14.0"] * 4 + ["4", "1", "1", "1"]
    assert len(rows) == 2 * len(ENGINES)
    text = report(results, 7, 2)
    assert text.startswith("7 images of 224") and text.count("A, large, fsdp") == len(SAVINGS)


def test_picture(tmp_path: Path) -> None:
    results = by_hand()
    axes = Figure().subplots()
    draw_panel(axes, {label: results[(*label, "fp32")] for label in (("A", "small"), ("A", "large"))}, 2)
    image = axes.images[0]
    colors = [to_hex(image.cmap(image.norm(value))) for value in image.get_array().ravel()]
    lines = [colors[: len(COLUMNS)], colors[len(COLUMNS) :]]
    # Fits 16 GiB where the table says so, 24 otherwise; 100 GiB fit none.
    assert lines[0] == [COLORS[0] if column in (("fsdp", 8), ("fsdp", 32)) else COLORS[1] for column in COLUMNS]
    assert set(lines[1]) == {COLORS[4]}
    assert [text.get_text() for text in axes.texts[: len(COLUMNS)]] == ["14.0"] * len(COLUMNS)
    with Image.open(draw_needs(results, 2, tmp_path / "needs.png")) as picture:
        assert picture.width > 1500


def test_setups_are_runs() -> None:
    setups = make_setups(["ViT-B/16", "ConvNeXt-L", SETR], 16)
    assert [(setup.backbone, setup.method) for setup in setups] == list(
        product(("ViT-B/16", "ConvNeXt-L", SETR), METHODS)
    )
    for setup in setups:
        check_config(setup.config)
        assert setup.config.train.batch_size == (2 if setup.backbone == SETR else 16)
    budgets = {setup.backbone: setup.config.method["budget"] for setup in setups if setup.method == "SPT-LoRA"}
    assert budgets == {"ViT-B/16": 400_000, "ConvNeXt-L": 400_000, SETR: 1_480_000}


def test_lora_of_convnext_is_on_what_it_has() -> None:
    lora = next(setup for setup in make_setups(["ConvNeXt-L"], 2) if setup.method == "LoRA")
    small = replace(lora.config.model, kwargs={"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)})
    # Two matrices a block, between 8 and 32 numbers, by modules of rank 8.
    assert plan_dry(replace(lora.config, model=small), 1).trainables.count == 4 * 2 * 8 * (8 + 32)


def test_pairs_of_columns_are_cases() -> None:
    assert {engine for engine, _ in COLUMNS} == set(ENGINES)
    assert all(ranks in RANKS for _, ranks in COLUMNS)
    for engine in ENGINES:
        own = [x for x, column in enumerate(COLUMNS) if column[0] == engine]
        assert all(after == before + 1 for before, after in pairwise(own))
