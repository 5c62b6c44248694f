"""The configs of both benchmarks."""

from pathlib import Path

import pytest
import timm
import torch

from spt_dist.config import check_arguments, load_config
from spt_dist.data.lists.fgvc import FGVC_SETS, build_fgvc
from spt_dist.data.lists.vtab import VTAB_TASKS, build_vtab
from spt_dist.suites import load_suite

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("name", VTAB_TASKS)
def test_vtab(name: str) -> None:
    config = load_config(CONFIGS / f"vtab/{name}.py")
    assert config.model.num_classes == VTAB_TASKS[name].num_classes
    assert (config.data["type"], config.data["task"], config.data["transform"]) == ("vtab", name, "vtab")
    check_arguments(build_vtab, {key: value for key, value in config.data.items() if key != "type"}, "data")


@pytest.mark.parametrize("name", FGVC_SETS)
def test_fgvc(name: str) -> None:
    config = load_config(CONFIGS / f"fgvc/{name}.py")
    assert config.model.num_classes == FGVC_SETS[name].num_classes
    assert (config.data["type"], config.data["data_set"], config.data["transform"]) == ("fgvc", name, "fgvc")
    check_arguments(build_fgvc, {key: value for key, value in config.data.items() if key != "type"}, "data")


def test_there_is_none_beside_them() -> None:
    for folder, names in (("vtab", VTAB_TASKS), ("fgvc", FGVC_SETS)):
        found = {path.stem for path in (CONFIGS / folder).glob("[!_]*.py")}
        # all.py, where there is one, is no task.
        assert found - {"all"} == set(names)


@pytest.mark.parametrize("file", ["vtab/cifar.py", "fgvc/cub.py"])
def test_images_are_normalised_as_in_the_published_code(file: str) -> None:
    """ziplab/SPT, lib/datasets.py: ImageNet's, though the backbone was trained with 0.5 and 0.5."""
    config = load_config(CONFIGS / file)
    assert (config.data.get("normalize"), config.model.normalize) == (None, "imagenet")


def test_a_suite_with_another_backbone_has_its_normalisation(tmp_path: Path) -> None:
    path, member = tmp_path / "clip.py", str(CONFIGS / "vtab" / "cifar.py")
    bases = [str(CONFIGS / "vtab" / "all.py"), str(CONFIGS / "_base_" / "models" / "clip_vit-b16_openai.py")]
    path.write_text(f"_base_ = {bases}\nsuite = dict(groups=dict(_delete_=True, one=[{member!r}]))\n")
    assert load_suite(path, {}).members[0].config.model.normalize == "clip"


@pytest.mark.parametrize("file", ["vtab/cifar.py", "fgvc/cub.py"])
def test_the_schedule_is_the_published_one(file: str) -> None:
    """ziplab/SPT: configs/vtab_supervised_spt_lora.sh, and the defaults of train_spt.py."""
    config = load_config(CONFIGS / file)
    train, method = config.train, config.method
    assert (train.epochs, train.batch_size, train.optimizer, train.schedule) == (100, 64, "adamw", "cosine")
    assert (train.lr, train.weight_decay, train.warmup_epochs) == (1e-3, 1e-4, 10)
    assert (train.warmup_lr, train.min_lr, train.clip_norm) == (1e-6, 1e-5, None)
    assert (train.mixup, train.cutmix) == (0, 0)
    assert (method["type"], method["structured"], method["budget"]) == ("spt", "lora", 400_000)
    assert (method["rank"], method["alpha"], method["beta"]) == (8, 10, 5)


def test_the_backbone_is_vit_b16_with_drop_path() -> None:
    config = load_config(CONFIGS / "vtab/cifar.py").model
    with torch.device("meta"):
        model = timm.create_model(config.name, num_classes=config.num_classes, **config.kwargs)
    backbone = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("head."))
    assert backbone == 85_798_656
    assert config.checkpoint == "checkpoints/ViT-B_16.npz"
    # It rises linearly to 0.1 in the last block.
    assert model.blocks[-1].drop_path2.drop_prob == pytest.approx(0.1)
    assert model.blocks[6].drop_path1.drop_prob == pytest.approx(0.6 / 11)
