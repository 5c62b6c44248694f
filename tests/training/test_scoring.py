"""Stage 1 as a run does it: which samples, which batches, and the published code's way."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from spt_dist import UserError, estimate_sensitivity
from spt_dist.config import load_config
from spt_dist.data.pictures import PicturePreparation
from spt_dist.data.samples import BadSampleError, Item, SampleSet
from spt_dist.data.shards.index import Shard, ShardIndex, Split
from spt_dist.data.shards.shard_set import ShardSet
from spt_dist.data.task import Task
from spt_dist.data.tasks import build_task
from spt_dist.training.scoring import build_model, choose_samples, load_scores, make_run_plan, score
from tests.launch.runs import NUM_TRAIN, write_backbone, write_config
from tests.models_for_tests import make_samples, make_vit, pick
from tests.ranks import run_ranks
from tests.sensitivity.oracle import relative_error


def task_of(num_train: int) -> Task:
    """A task with so many training samples."""
    samples = TensorDataset(torch.zeros(num_train))
    return Task(samples, samples, num_train, num_train, 10)


def score_on_ranks(path: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], list[int]]:
    """All scores of a config, and the samples they were made from."""
    config = load_config(path, options)
    scores = score(config, build_model(config), build_task(config.data, config.model.num_classes))
    assert scores.info.sample_ids is not None
    return {name: scores[name] for name in scores.names}, scores.info.sample_ids


def squares_of_batches(path: str, options: dict[str, Any], batches: list[list[int]]) -> dict[str, Tensor]:
    """Sum over batches of the squared gradient of the mean loss, by an ordinary loop."""
    config = load_config(path, options)
    model, task = build_model(config), build_task(config.data, config.model.num_classes)
    model.train(config.sensitivity.train_mode)
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    torch.manual_seed(config.seed)
    # A generator of its own: otherwise the loader would draw from the one that drop-path draws from.
    for images, labels in DataLoader(task.train, batch_sampler=batches, generator=torch.Generator()):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad**2
    return sums


def check_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Up to rounding; k's bias has no gradient."""
    for name, value in found.items():
        if not name.endswith("attn.k.bias"):
            assert relative_error(value, pick(wanted, name)) < 1e-4, name


@pytest.mark.distributed
@pytest.mark.parametrize("num_samples", [50, 30])
def test_batches_are_the_same_for_every_number_of_ranks(tmp_path: Path, num_samples: int) -> None:
    """50 samples are batches of 16, 16, 16 and 2; with 30, the third rank has none."""
    path = str(write_config(tmp_path / "tiny.py"))
    options = {"sensitivity.criterion": "batch", "sensitivity.num_samples": num_samples}
    for world_size in (1, 2, 3):
        for found, sample_ids in run_ranks(score_on_ranks, world_size, path, options):
            assert len(sample_ids) == len(set(sample_ids)) == num_samples
            assert sample_ids == sorted(sample_ids)
            batches = [sample_ids[start : start + 16] for start in range(0, num_samples, 16)]
            check_equal(found, squares_of_batches(path, options, batches))


def write_released(folder: Path, line: str = "") -> str:
    """A config with the preset; there are fewer samples than its 512."""
    base = write_config(folder / "base.py", drop_path_rate=0.5)
    path = folder / "released.py"
    path.write_text(f"_base_ = ['{base.name}']\nsensitivity = dict(_delete_=True, preset='released'{line})\n")
    return str(path)


@pytest.mark.distributed
def test_the_released_preset_is_the_published_loop(tmp_path: Path) -> None:
    path = write_released(tmp_path)
    options = {"seed": 3}
    ((found, sample_ids),) = run_ranks(score_on_ranks, 1, path, options)
    assert sample_ids == list(range(NUM_TRAIN))
    batches = [sample_ids[start : start + 32] for start in range(0, NUM_TRAIN, 32)]
    check_equal(found, squares_of_batches(path, options, batches))
    # Drop-path was on: without it the scores are others.
    calm = squares_of_batches(path, options | {"model.kwargs.drop_path_rate": 0.0}, batches)
    assert relative_error(found["blocks.1.mlp.fc1.weight"], calm["blocks.1.mlp.fc1.weight"]) > 0.01


def test_the_presets_values(tmp_path: Path) -> None:
    config = load_config(write_released(tmp_path, ", batch_size=32"))
    assert config.sensitivity.preset == "released"
    assert (config.sensitivity.num_samples, config.sensitivity.batch_size) == (512, 32)
    assert (config.sensitivity.criterion, config.sensitivity.train_mode) == ("batch", True)
    assert choose_samples(config, task_of(1000)) == list(range(512))
    assert choose_samples(config, task_of(300)) == list(range(300))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sensitivity.num_samples": 800},
            r"sensitivity\.num_samples=800, but .*preset='released' means 512; leave one",
        ),
        ({"sensitivity.criterion": "per_sample"}, r"sensitivity\.criterion='per_sample', but .* means 'batch'"),
        ({"sensitivity.preset": "realeased"}, r"sensitivity\.preset='realeased' is unknown; did you mean 'released'\?"),
        ({"sensitivity.preset": None, "sensitivity.sample_order": "fiel"}, r"sample_order='fiel' is unknown; did you"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write_released(tmp_path), options)


def test_a_random_choice_needs_enough_samples(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "tiny.py"))
    chosen = choose_samples(config, task_of(NUM_TRAIN))
    assert len(set(chosen)) == 50
    assert chosen != list(range(50))
    with pytest.raises(UserError, match=r"sensitivity\.num_samples=50, but the task has 49 samples"):
        choose_samples(config, task_of(49))


def test_samples_in_shards_are_chosen_among_all_unless_few_shards_shall_be_read(tmp_path: Path) -> None:
    """50 shards of 100, each of one class: a shuffled epoch begins with few of them."""
    sizes, shards = [100] * 50, []
    for number, size in enumerate(sizes):
        shards.append(Shard(f"train-{number}.tar", 1, size, "", bytes(4 * size)))
    index = ShardIndex("classification", tuple(map(str, range(50))), {"train": Split(tuple(shards))})
    samples = ShardSet("nowhere", index, "train", PicturePreparation("vtab", 8), lanes=4)
    task = Task(samples, samples, len(samples), len(samples), 50)
    chosen = {}
    for order in ("random", "epoch"):
        options = {"sensitivity.sample_order": order, "sensitivity.num_samples": 200}
        chosen[order] = choose_samples(load_config(write_config(tmp_path / "tiny.py"), options), task)
        assert len(set(chosen[order])) == 200
        assert chosen[order] == sorted(chosen[order])
    classes = {order: {sample // 100 for sample in samples} for order, samples in chosen.items()}
    assert len(classes["random"]) > 40
    assert 4 <= len(classes["epoch"]) <= 16


def test_names_that_the_released_preset_does_not_know_are_refused_before_the_pass(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "tiny.py", init_values=0.1), {"method.preset": "released"})
    task = build_task(config.data, config.model.num_classes)
    # Without a process group the pass itself would fail in another way.
    with pytest.raises(UserError, match=r"has no rule for blocks\.0\.ls1\.gamma"):
        make_run_plan(config, task)


def test_saved_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    """By names and shapes, and by the size where all that was scored is there."""
    model, other = make_vit(), make_vit(depth=3)
    images, labels = make_samples(4)
    estimate_sensitivity(model, [(images, labels)], F.cross_entropy).save(tmp_path)
    assert load_scores(str(tmp_path), make_vit()).names
    for wrong in (other, make_vit(embed_dim=32)):
        with pytest.raises(UserError, match=r"scores of another model, of [\d,]+ weights and with \w+ of shape"):
            load_scores(str(tmp_path), wrong)


def score_broken_on_ranks(path: str) -> str:
    """What is said about an image of rank 1's that holds NaN."""
    config = load_config(path, {"sensitivity.num_samples": 6})
    task = build_task(config.data, config.model.num_classes)
    broken = choose_samples(config, task)[3]
    images, labels = zip(*(task.train[place] for place in range(task.num_train)), strict=True)
    pixels = torch.stack(images)
    pixels[broken, 0, 0, 0] = float("nan")
    task = replace(task, train=TensorDataset(pixels, torch.tensor(labels)))
    with pytest.raises(UserError) as caught:
        score(config, build_model(config), task)
    assert f"for training sample {broken}" in str(caught.value)
    return str(caught.value)


@pytest.mark.distributed
def test_a_broken_image_is_named_by_its_place_in_the_training_set(tmp_path: Path) -> None:
    said = run_ranks(score_broken_on_ranks, 2, str(write_config(tmp_path / "tiny.py")))
    assert said[0] == said[1]
    assert "the inputs hold NaN" in said[0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_shortened_weights_are_scored_under_autocast(tmp_path: Path, engine: str) -> None:
    """And the plan's rank agrees with that of full precision for most of the weights."""
    backbone = write_backbone(tmp_path / "backbone.safetensors", 0)
    path = str(write_config(tmp_path / "tiny.py", checkpoint=backbone))
    options = {"engine.type": engine, "engine.amp": True, "engine.frozen_dtype": "bfloat16"}
    plain, short = run_ranks(plans_on_ranks, 2, path, options)[0]
    assert 0.7 * plain < short


def plans_on_ranks(path: str, options: dict[str, Any]) -> tuple[int, int]:
    """How many weights are trained one by one, and how many of them also by the plan of shortened weights."""
    plans = []
    for changes in ({}, options):
        config = load_config(path, {"method.structured": None, **changes})
        plans.append(make_run_plan(config, build_task(config.data, config.model.num_classes))[0].sparse)
    both = {
        name: set(plans[0].get(name, torch.empty(0)).tolist()) & set(places.tolist())
        for name, places in plans[1].items()
    }
    return sum(len(places) for places in plans[0].values()), sum(map(len, both.values()))


class Flaky(SampleSet):
    """Digits of which one can't be read, always, or from the second time on."""

    skip_bad = True

    def __init__(self, samples: TensorDataset, bad: int, good_reads: int) -> None:
        self.samples, self.bad, self.good_reads = samples, bad, good_reads

    def __len__(self) -> int:
        return len(self.samples)

    def item(self, epoch: int | None, index: int) -> Item:
        if index == self.bad:
            self.good_reads -= 1
            if self.good_reads < 0:
                raise BadSampleError(f"{index}.jpg: is cut off")
        image, label = self.samples[index]
        return image, int(label)

    def finish(self, inputs: Sequence[Tensor], epoch: int | None, indices: Sequence[int]) -> Tensor:
        return torch.stack(list(inputs))

    def blank(self) -> Item:
        return torch.zeros_like(self.samples[0][0]), 0


def score_flaky(path: str, good_reads: int) -> tuple[dict[str, Tensor], list[int]] | str:
    """Scores of 20 of the first samples, of which number 7 is bad."""
    config = load_config(path, {"sensitivity.num_samples": 20, "sensitivity.sample_order": "file"})
    task = build_task(config.data, config.model.num_classes)
    assert isinstance(task.train, TensorDataset)
    task = replace(task, train=Flaky(task.train, 7, good_reads))
    try:
        scores = score(config, build_model(config), task)
    except UserError as error:
        return str(error)
    assert scores.info.sample_ids is not None
    return {name: scores[name] for name in scores.names}, scores.info.sample_ids


def score_without(path: str) -> dict[str, Tensor]:
    """Scores of the same samples but number 7, which are all good."""
    config = load_config(path)
    task, model = build_task(config.data, config.model.num_classes), build_model(config)
    chosen = [index for index in range(20) if index != 7]
    images, labels = zip(*(task.train[index] for index in chosen), strict=True)
    scores = estimate_sensitivity(model, [(torch.stack(images), torch.stack(labels))], F.cross_entropy)
    return {name: scores[name] for name in scores.names}


@pytest.mark.distributed
def test_a_bad_sample_is_left_out_of_the_scores_and_none_takes_its_place(tmp_path: Path) -> None:
    path = str(write_config(tmp_path / "tiny.py"))
    (wanted,) = run_ranks(score_without, 1, path)
    for world_size in (1, 2):
        for found in run_ranks(score_flaky, world_size, path, 0):
            assert found[1] == [index for index in range(20) if index != 7]
            assert found[0].keys() == wanted.keys()
            for name in wanted.keys() - {name for name in wanted if name.endswith("attn.k.bias")}:
                assert relative_error(found[0][name], wanted[name]) < 1e-4, name


@pytest.mark.distributed
def test_a_sample_that_goes_bad_between_two_readings_ends_the_pass(tmp_path: Path) -> None:
    (said,) = run_ranks(score_flaky, 1, str(write_config(tmp_path / "tiny.py")), 1)
    assert said == "training sample 7 could be read at first, and can not any more"
