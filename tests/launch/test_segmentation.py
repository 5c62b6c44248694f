"""Segmentation through the scripts, from drawn scenes to mIoU and pictures."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from spt_dist.data.scenes import make_scenes
from tests.launch.processes import ROOT, Launch, run_all, run_script
from tests.launch.runs import read_lines, read_plan, read_summary, read_task

pytestmark = [pytest.mark.slow, pytest.mark.segmentation, pytest.mark.timeout(900)]

CONFIG = ROOT / "configs/ade20k/scenes_spt_lora.py"
SHORT = ["train.iterations=5", "train.batch_size=4", "train.eval_interval=5", "train.checkpoint_interval=2"]
SHORT += ["train.warmup_epochs=0", "sensitivity.num_samples=4", "log.backends=[]"]
METHODS = {"spt-lora": 1_480_000, "spt-adapter": 1_480_000, "lora": 786_432, "adapter": 417_984, "vpt": 245_760}
HEAD, BACKBONE = 13_143_640, 304_147_456


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 3 held-out scenes."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "root", 12, 3, size=64, show_progress=False)


def train(root: Path, work_dir: Path, *options: str, more: tuple[str, ...] = ()) -> list[str | Path]:
    """A short run's arguments."""
    return ["train.py", CONFIG, "--work-dir", work_dir, *more, "--cfg-options", f"data.root={root}", *SHORT, *options]


@pytest.fixture(scope="module")
def work_dirs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on one rank, on two under FSDP2 and on two under ZeRO-3."""
    folder = tmp_path_factory.mktemp("runs")
    zero3 = ("engine.type=deepspeed", "engine.zero_stage=3")
    launches = {
        "alone": Launch(train(root, folder / "alone")),
        "fsdp": Launch(train(root, folder / "fsdp", more=("--engine", "fsdp")), "torchrun", 2, 300),
        "zero3": Launch(train(root, folder / "zero3", *zero3), "deepspeed", 2, 300),
    }
    for result in run_all(launches).values():
        result.check()
    return {name: folder / name for name in launches}


def test_every_engine_and_number_of_ranks_trains_the_same(work_dirs: dict[str, Path]) -> None:
    expected = read_lines(work_dirs["alone"])
    assert [line["step"] for line in expected if "loss" in line] == [1, 2, 3, 4, 5]
    for name in ("fsdp", "zero3"):
        found = read_lines(work_dirs[name])
        for line, other in zip(found, expected, strict=True):
            assert line == pytest.approx(other, rel=2e-3), name
        assert read_plan(work_dirs[name]).matrices == read_plan(work_dirs["alone"]).matrices
    plan, task = read_plan(work_dirs["alone"]), read_task(work_dirs["alone"])
    assert all(name.startswith("backbone.blocks.") for name in plan.matrices)
    assert not plan.sparse
    # The running means have moved away from where they start.
    variances = [value for name, value in task.items() if name.endswith("running_var")]
    assert variances and not any(torch.equal(value, torch.ones_like(value)) for value in variances)
    summary = read_summary(work_dirs["alone"])
    assert summary["metric"] == "mIoU"
    assert set(summary["scores"]) == {"mIoU", "mAcc", "aAcc"}


def test_from_a_task_file_to_numbers_and_pictures(root: Path, work_dirs: dict[str, Path], tmp_path: Path) -> None:
    work_dir, options = work_dirs["alone"], ["--cfg-options", f"data.root={root}"]
    task, merged = work_dir / "task.safetensors", tmp_path / "merged.safetensors"
    run_script(["merge.py", task, "--config", CONFIG, "--out", merged]).check()
    panels = ["--multi-scale", "--visualize", "2", "--out", tmp_path / "panels"]
    results = run_all(
        {
            "task": Launch(["evaluate.py", CONFIG, "--task", task, *panels, *options], "torchrun", 2),
            "merged": Launch(["evaluate.py", CONFIG, "--merged", merged, *options]),
            "report": Launch(["report.py", work_dir, work_dirs["fsdp"], "--out", tmp_path / "report"]),
        }
    )
    shares = {name: dict(re.findall(r"^(\S.*?) {2,}([\d.]+)%$", r.check().stdout, re.M)) for name, r in results.items()}
    wanted = f"{100 * read_summary(work_dir)['scores']['mIoU']:.2f}"
    assert shares["task"]["mIoU"] == wanted
    assert float(shares["merged"]["mIoU"]) == pytest.approx(float(wanted), abs=0.02)
    assert {"mIoU m.s.", "mean accuracy m.s.", "pixel accuracy m.s."} < shares["task"].keys()
    pictures = sorted((tmp_path / "panels").iterdir())
    assert [path.name for path in pictures] == ["ADE_val_00000001.png", "ADE_val_00000002.png"]
    for path in pictures:
        assert imread(path).std() > 0.05
    assert "mIoU %" in (tmp_path / "report" / "report.txt").read_text()
    assert "backbone.blocks.0.attn.qkv.weight" in load_file(merged)


def test_bad_files_end_a_run_by_name_or_are_left_out_with_a_count(root: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(root, tmp_path / "damaged")
    image = damaged / "images/training/ADE_train_00000003.jpg"
    image.write_bytes(image.read_bytes()[:200])
    all_scored = ("data.num_workers=1", "sensitivity.num_samples=12")
    skipping = train(damaged, tmp_path / "skipping", more=("--skip-bad-samples",))
    results = run_all(
        {
            "ends": Launch(train(damaged, tmp_path / "ends", *all_scored), "torchrun", 2, 300),
            "skips": Launch(skipping, "torchrun", 2, 300),
        }
    )
    assert results["ends"].rc != 0
    assert any(str(image) in line and "--skip-bad-samples" in line for line in results["ends"].error_lines)
    results["skips"].check()
    told = " ".join((results["skips"].stdout + results["skips"].stderr).split())
    assert "1 bad training samples are left out, 11 remain" in told
    assert len(read_plan(tmp_path / "skipping").matrices) > 0


def test_options_for_segmentation_are_refused_elsewhere(tmp_path: Path) -> None:
    config = ROOT / "configs/quickstart/digits_linear.py"
    arguments = ["evaluate.py", config, "--task", tmp_path / "none"]
    results = run_all(
        {
            "--multi-scale": Launch([*arguments, "--multi-scale"]),
            "--visualize": Launch([*arguments, "--visualize", "3"]),
            "--skip-bad-samples": Launch([*arguments, "--skip-bad-samples"]),
        }
    )
    for option, result in results.items():
        assert result.rc == 2
        assert len(result.error_lines) == 1
        assert option in result.error_lines[0]


@pytest.mark.parametrize("method", [*METHODS, "linear", "full"])
def test_the_published_setting_trains_as_many_as_the_paper(method: str) -> None:
    """From the config alone: the dry run needs neither data nor weights."""
    from spt_dist.config import load_config
    from spt_dist.models.classifier import create_model
    from spt_dist.models.matrices import take_inventory
    from spt_dist.training.pipeline import check_config
    from spt_dist.tuning.methods import make_plan

    config = load_config(ROOT / f"configs/ade20k/setr_pup_vit-l_512x512_{method}.py")
    check_config(config)
    model = create_model(config.model.name, config.model.num_classes, config.model.kwargs, torch.device("meta"))
    inventory = take_inventory(model)
    assert inventory.backbone_size == BACKBONE
    assert sum(model.get_parameter(name).numel() for name in inventory.head) == HEAD
    options = {key: value for key, value in config.method.items() if key != "type"}
    if config.method["type"] == "spt":
        count = options["budget"]
        # 14.6 M with the head, whatever the scores: what is left of the budget is less than the largest module costs.
        largest = {"lora": 8 * (1024 + 4096), "adapter": 2 * 8 * 4096 + 8 + 4096}[options["structured"]]
        assert {round((HEAD + trained) / 1e6, 1) for trained in (count, count - largest)} == {14.6}
    else:
        count = make_plan(config.method["type"], model, **options).num_trainable
    assert count == {**METHODS, "linear": 0, "full": BACKBONE}[method]
    train = config.train
    assert (train.iterations, train.batch_size, train.optimizer, train.momentum) == (160_000, 16, "sgd", 0.9)
    assert (train.lr, train.head_lr_mult, train.min_lr, train.weight_decay) == (1e-3, 10, 1e-4, 0)
    assert (train.schedule, train.poly_power) == ("poly", 0.9)
    assert model.backbone.out_indices == [9, 14, 19, 23]
