"""The hook within mmseg's own tools.

Shape suffixes: none; images are (3, H, W) and labels (H, W).
"""

import copy
import random
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spt_dist import Plan, Scores, UserError, inject, load_delta
from tests.models_for_tests import pick
from tests.ranks import run_ranks

pytest.importorskip("mmseg", reason="needs the segmentation extra")
from tests.training.mmseg_for_tests import (
    BUDGET,
    NUM_SCORED,
    NUM_TRAIN,
    TOOLS,
    build_plain,
    read_logged,
    run_tool,
    write_config,
    write_world,
)

pytestmark = pytest.mark.segmentation


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes and a pre-trained backbone."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def config(world: Path) -> Path:
    """A config as users have it."""
    return write_config(world, "setr")


@pytest.fixture(scope="module")
def trained(world: Path, config: Path) -> Path:
    """Work dir of an uninterrupted run of mmseg's train.py, whose output is in ``output.txt``."""
    work_dir = world / "trained"
    output = run_tool("train.py", config, "--work-dir", work_dir)
    (work_dir / "output.txt").write_text(output)
    return work_dir


def load(work_dir: Path, iteration: int) -> dict[str, Any]:
    """A checkpoint of mmengine, by torch's loader as it is."""
    checkpoint: dict[str, Any] = torch.load(work_dir / f"iter_{iteration}.pth")
    return checkpoint


def is_head(name: str) -> bool:
    """Whether a parameter or buffer is one of the heads'."""
    return name.startswith(("decode_head.", "auxiliary_head."))


def test_only_the_plan_and_the_heads_are_trained(world: Path, config: Path, trained: Path) -> None:
    plan = Plan.load(trained / "plan.safetensors")
    assert plan.method == "spt-lora"
    assert 0 < plan.num_trainable <= BUDGET
    assert plan.num_sparse == 0
    assert all(name.startswith("backbone.") for name in plan.shapes)

    given = {f"backbone.{name}": value for name, value in load_file(world / "backbone.safetensors").items()}
    halfway, last = (load(trained, iteration)["state_dict"] for iteration in (2, 4))
    assert {name for name, value in given.items() if not torch.equal(last[name], value)} == {"backbone.cls_token"}
    added = {name for name in last if name not in given and not is_head(name)}
    assert sum(last[name].numel() for name in added) + given["backbone.cls_token"].numel() == plan.num_trainable

    moved = {name for name in last if not torch.equal(last[name], halfway[name])}
    # What `down` gets through an `up` that is close to zero is too little for fp32; its momentum shows it.
    assert moved >= {name for name in added if name.endswith(".up")} | {"backbone.cls_token"}
    plain = build_plain(config)
    assert {name for name in moved if is_head(name)} == {name for name in plain.state_dict() if is_head(name)}
    assert set(plan.head) == {name for name, _ in plain.named_parameters() if is_head(name)}


def test_optimizer_and_schedule_are_the_configs(trained: Path) -> None:
    plan = Plan.load(trained / "plan.safetensors")
    optimizer = load(trained, 4)["optimizer"]
    rates = [group["initial_lr"] for group in optimizer["param_groups"]]
    num_tuned = 2 * len(plan.matrices) + len(plan.parameters)
    assert rates.count(0.01) == num_tuned
    assert rates.count(pytest.approx(0.1)) == len(plan.head)
    assert len(rates) == num_tuned + len(plan.head) == len(optimizer["state"])
    assert all(state["momentum_buffer"].abs().max() > 0 for state in optimizer["state"].values())
    for group in optimizer["param_groups"]:
        # PolyLR with end=100 takes 99 steps down to eta_min.
        decayed = (group["initial_lr"] - 1e-4) * (1 - 4 / 99) ** 0.9 + 1e-4
        assert group["lr"] == pytest.approx(decayed, rel=1e-9)


def test_the_run_is_validated_and_logged(trained: Path) -> None:
    output = (trained / "output.txt").read_text()
    assert len(re.findall(r"mIoU: \d", output)) == 2
    assert "trainable parameters" in output
    assert set(read_logged(trained)) == {1, 2, 3, 4}


def test_the_task_file_is_what_was_trained(config: Path, trained: Path) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = inject(build_plain(config), Plan.load(trained / "plan.safetensors"))
    wanted.load_state_dict(load(trained, 4)["state_dict"])
    loaded = load_delta(build_plain(config), trained / "task.safetensors")
    assert torch.equal(loaded(images, mode="tensor"), wanted(images, mode="tensor"))


def test_a_resumed_run_is_the_uninterrupted_one(config: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "iter_2.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    # Without its pre-trained weights, so that frozen ones have to come from the checkpoint.
    options = ["--cfg-options", "model.backbone.init_cfg=None"]
    run_tool("train.py", config, "--work-dir", tmp_path, "--resume", *options)
    losses = read_logged(trained)
    assert read_logged(tmp_path) == {iteration: losses[iteration] for iteration in (3, 4)}
    found, wanted = load(tmp_path, 4), load(trained, 4)
    assert found["state_dict"].keys() == wanted["state_dict"].keys()
    assert all(torch.equal(value, wanted["state_dict"][name]) for name, value in found["state_dict"].items())
    for number, state in wanted["optimizer"]["state"].items():
        assert torch.equal(found["optimizer"]["state"][number]["momentum_buffer"], state["momentum_buffer"])
    curve, whole = (one["message_hub"]["log_scalars"]["train/loss"]["values"] for one in (found, wanted))
    assert torch.equal(curve, whole), "mmengine's own record goes on"
    found, wanted = (load_file(work_dir / "task.safetensors") for work_dir in (tmp_path, trained))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert not (tmp_path / "scores").exists(), "it was not scored again"


def test_checkpoints_are_tested_with_the_same_config(config: Path, trained: Path, tmp_path: Path) -> None:
    output = run_tool("test.py", config, trained / "iter_4.pth", "--work-dir", tmp_path)
    (again,) = re.findall(r"Iter\(test\) .*mIoU: (\S+)", output)
    assert again == re.findall(r"Iter\(val\) .*mIoU: (\S+)", (trained / "output.txt").read_text())[-1]


def make_runner(config: Path, work_dir: Path, **options: Any) -> tuple[Any, Any]:
    """A runner as it is before training, with weights, loop, optimizer and schedulers; and its SPTHook."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    content = Config.fromfile(config)
    content.work_dir = str(work_dir)
    content.merge_from_dict(options)
    runner = Runner.from_cfg(content)
    assert runner.train_loop is not None
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.model.init_weights()
    return runner, next(hook for hook in runner.hooks if type(hook).__name__ == "SPTHook")


def squared_gradients(model: nn.Module, dataset: Any, samples: list[int]) -> dict[str, torch.Tensor]:
    """A loop over single images in float64, with mmseg's own loss."""
    totals = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for sample in samples:
        batch = {key: [value] for key, value in dataset[sample].items()}
        prepared = model.data_preprocessor(batch, training=True)
        losses = model.loss(prepared["inputs"].double(), prepared["data_samples"])
        assert sum("loss" in name for name in losses) == 2, "decode and auxiliary head"
        model.zero_grad()
        sum(value for name, value in losses.items() if "loss" in name).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                totals[name] += parameter.grad.square()
    return totals


def score_in_loop(config: Path, work_dir: Path) -> tuple[list[int], bool, dict[str, tuple[float, float]]]:
    """Ids of the scored samples; whether injection kept the outputs; name -> largest error and largest score."""
    runner, hook = make_runner(config, work_dir, auto_scale_lr={"enable": True, "base_batch_size": 1})
    model, dataset = runner.model, runner.train_dataloader.dataset
    plain = copy.deepcopy(model).double().eval()
    images = torch.randn(2, 3, 32, 32)
    before = model.eval()(images, mode="tensor")
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    hook.before_train(runner)
    same_state = torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert same_state and np.array_equal(states[1], np.random.get_state()[1])
    assert {round(group["lr"], 6) for group in runner.optim_wrapper.optimizer.param_groups} == {0.02, 0.2}, (
        "batches of 2"
    )
    assert runner.optim_wrapper._max_counts == 4, "which accumulation goes by"
    scores = Scores.load(work_dir / "scores")
    wanted = squared_gradients(plain, dataset, scores.info.sample_ids)
    errors = {}
    for name in scores.names:
        exact = pick(wanted, name)
        errors[name] = float((scores[name] - exact).abs().max()), float(exact.max())
    return scores.info.sample_ids, torch.equal(model(images, mode="tensor"), before), errors


def test_scores_are_those_of_mmsegs_loss_image_by_image(world: Path, tmp_path: Path) -> None:
    config = write_config(world, "fixed", transforms="fixed")
    ((samples, kept_outputs, errors),) = run_ranks(score_in_loop, 1, config, tmp_path)
    assert samples == sorted(set(samples))
    assert len(samples) == NUM_SCORED
    assert kept_outputs
    assert {name.split(".")[0] for name in errors} == {"backbone"}
    assert len(errors) > 30
    for name, (error, largest) in errors.items():
        # The gradient of k's bias is zero but for rounding.
        assert error <= 1e-5 * largest or name.endswith("attn.k.bias"), name
    assert max(largest for _, largest in errors.values()) > 1e-6


def train_on_rank(config: Path, work_dir: Path) -> dict[str, torch.Tensor]:
    """mmseg's train.py on this rank; returns the trained values that its model ends with."""
    from mmengine.runner import Runner

    models = []
    wrap = Runner.wrap_model

    def remember(self: Any, *args: Any) -> nn.Module:
        models.append(wrap(self, *args))
        return models[-1]

    Runner.wrap_model = remember
    sys.argv = ["train.py", str(config), "--work-dir", str(work_dir), "--launcher", "pytorch"]
    runpy.run_path(str(TOOLS / "train.py"), run_name="__main__")
    assert len(models) == 2, "wrapped again, for the new parameters"
    return {name: value.detach() for name, value in models[-1].module.named_parameters() if value.requires_grad}


@pytest.mark.distributed
def test_ranks_share_the_scoring_and_train_as_one(world: Path, tmp_path: Path) -> None:
    results = {}
    for world_size in (1, 2):
        # Batch norm would see other batches.
        name = f"on_{world_size}"
        config = write_config(world, name, transforms="fixed", norm=None, batch_size=4 // world_size)
        results[world_size] = run_ranks(train_on_rank, world_size, config, tmp_path / name)
    one, two = (Scores.load(tmp_path / name / "scores") for name in ("on_1", "on_2"))
    assert one.info.sample_ids == two.info.sample_ids
    for name in one.names:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-12), name
    plans = [Plan.load(tmp_path / name / "plan.safetensors") for name in ("on_1", "on_2")]
    assert plans[0].matrices == plans[1].matrices

    (alone,), (first, second) = results[1], results[2]
    assert len(alone) == 2 * len(plans[0].matrices) + len(plans[0].parameters) + len(plans[0].head)
    assert alone.keys() == first.keys() == second.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], value, rtol=1e-4, atol=1e-6), name


def collect_errors(config: Path, work_dir: Path) -> dict[str, str]:
    """What -> message, of setups that are refused."""
    found = {}

    def refuse(what: str, call: Any, *args: Any) -> None:
        with pytest.raises(UserError) as caught:
            call(*args)
        found[what] = str(caught.value)

    own = {"type": "VisionTransformer", "_delete_": True, "embed_dims": 24, "num_layers": 2, "num_heads": 2}
    own |= {"img_size": 32, "patch_size": 8, "out_indices": (0, 1)}
    runner, hook = make_runner(config, work_dir, **{"model.backbone": own})
    refuse("mmseg's backbone", hook.before_run, runner)
    runner, hook = make_runner(config, work_dir, **{"custom_hooks.0.num_samples": NUM_TRAIN + 1})
    refuse("samples", hook.before_train, runner)
    runner, hook = make_runner(config, work_dir, **{"custom_hooks.0.budget": 10})
    refuse("budget", hook.before_run, runner)
    runner.train_loop._iter = 2
    refuse("resumed without a plan", hook.before_train, runner)
    runner.register_hook({"type": "EMAHook"})
    refuse("EMA", hook.before_run, runner)

    runner, hook = make_runner(config, work_dir)
    hook.before_train(runner)
    checkpoint: dict[str, Any] = {"message_hub": runner.message_hub.state_dict()}
    hook.before_save_checkpoint(runner, checkpoint)
    other, hook = make_runner(config, work_dir, **{"custom_hooks.0.rank": 4})
    refuse("other options", hook.after_load_checkpoint, other, checkpoint)
    return found


def test_what_cannot_work_is_refused(world: Path, tmp_path: Path) -> None:
    config = write_config(world, "errors", norm="BN")
    (found,) = run_ranks(collect_errors, 1, config, tmp_path)
    assert "nn.MultiheadAttention" in found["mmseg's backbone"]
    assert "type='TimmVisionTransformer'" in found["mmseg's backbone"]
    assert found["samples"] == "SPTHook: num_samples=7, but there are 6 training images"
    assert found["budget"].startswith("budget=10: 10 parameters are not enough")
    assert found["resumed without a plan"].startswith("SPTHook: the checkpoint that was resumed holds no plan")
    assert "EMAHook copies the model" in found["EMA"]
    assert found["other options"].startswith("SPTHook: rank=4, but the checkpoint's plan was made with 2; make them")


def test_wrong_options_are_refused() -> None:
    from spt_dist.training.mmseg_hook import SPTHook

    with pytest.raises(UserError, match=r"SPTHook\.budgett is unknown; .*budget"):
        SPTHook(budgett=10)
    with pytest.raises(UserError, match=r"SPTHook\.budget='many' has to be"):
        SPTHook(budget="many")
    with pytest.raises(UserError, match=r"SPTHook: num_samples=0: has to be at least 1"):
        SPTHook(num_samples=0, budget=10)


def test_other_models_are_refused(config: Path) -> None:
    from spt_dist.training.mmseg_hook import as_segmentor

    with pytest.raises(UserError, match=r"model\.type='Linear': only 'EncoderDecoder' can be scored"):
        as_segmentor(nn.Linear(2, 2))
    model = build_plain(config)
    model.auxiliary_head[0].sampler = object()
    with pytest.raises(UserError, match="has a sampler, which picks pixels"):
        as_segmentor(model)


def test_a_scored_image_depends_on_seed_and_index_alone(config: Path) -> None:
    from mmengine.config import Config
    from mmseg.registry import DATASETS

    from spt_dist.training.mmseg_hook import SPTHook

    model = build_plain(config)
    built = DATASETS.build(Config.fromfile(config).train_dataloader.dataset)

    class OneImage:
        """Has the same image everywhere."""

        def __getitem__(self, index: int) -> Any:
            return built[1]

    def read(index: int, seed: int = 0, dataset: Any = built) -> torch.Tensor:
        image, labels = SPTHook(seed=seed, budget=10).read(dataset, index, model.data_preprocessor)
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert labels.shape == (32, 32)
        assert labels.dtype == torch.int64
        return torch.cat([image, labels[None].float()])

    first = read(1)
    np.random.seed(7)
    read(2)
    assert torch.equal(read(1), first)
    assert not torch.equal(read(1, seed=1), first)
    assert not torch.equal(read(2, dataset=OneImage()), first), "each image has a crop of its own"


def test_batches_hold_images_of_one_size() -> None:
    from spt_dist.training.mmseg_hook import stack

    sizes = [(2, 2), (2, 2), (2, 3), (2, 2)]
    samples = [(torch.full((3, *size), float(n)), torch.full(size, n)) for n, size in enumerate(sizes)]
    batches = list(stack(samples))
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 2, 2), (1, 3, 2, 3), (1, 3, 2, 2)]
    assert [labels.flatten().unique().tolist() for _, labels in batches] == [[0, 1], [2], [3]]
