"""Mistakes in a config: each is refused with the name of the key, its value and what to do."""

import sys
from pathlib import Path
from typing import Any

import pytest

from spt_dist import UserError
from spt_dist.config import load_config
from spt_dist.data.tasks import build_task
from spt_dist.suites import is_suite, load_suite
from spt_dist.training.pipeline import check_config
from tests.launch.processes import ROOT
from tests.launch.runs import write_config


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """A config in order."""
    return write_config(tmp_path / "tiny.py")


def test_bases_file_and_options_in_that_order(config_path: Path) -> None:
    config = load_config(config_path, {"train.lr": 0.5, "method.rank": 7})
    assert config.train.weight_decay == 1e-4, "from the base"
    assert config.train.batch_size == 32, "from the file, over the base's 64"
    assert config.train.lr == 0.5, "from the options, over the file's 3e-2"
    assert config.method == {
        "type": "spt",
        "structured": "lora",
        "rank": 7,
        "budget": 1000,
        "alpha": 4.0,
        "beta": 4.0,
    }
    assert config.work_dir == "work_dirs/tiny"
    check_config(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"train.epoch": 3}, r"train\.epoch is unknown; did you mean 'epochs'\?", id="train"),
        pytest.param({"trian": {"epochs": 3}}, r"trian is unknown; did you mean 'train'\?", id="section"),
        pytest.param({"model.checkpiont": "x"}, r"model\.checkpiont .* did you mean 'checkpoint'\?", id="model"),
        pytest.param({"sensitivity.samples": 3}, r"sensitivity\.samples .* did you mean '\w*samples'\?", id="scoring"),
        pytest.param({"engine.stage": 3}, r"engine\.stage .* did you mean 'zero_stage'\?", id="engine"),
        pytest.param({"engine.qqq": 3}, r"engine\.qqq is unknown; known: type, zero_stage, offload", id="nothing near"),
    ],
)
def test_unknown_key(config_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(config_path, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.epochs": "x"}, r"train\.epochs='x' has to be int"),
        ({"train.epochs": 1.5}, r"train\.epochs=1\.5 has to be int"),
        ({"train.epochs": True}, r"train\.epochs=True has to be int"),
        ({"train.lr": "1e-3"}, r"train\.lr='1e-3' has to be float"),
        ({"train.clip_norm": "x"}, r"train\.clip_norm='x' has to be float or None"),
        ({"model.kwargs": 3}, r"model\.kwargs=3 has to be dict"),
        ({"model.checkpoint": 3}, r"model\.checkpoint=3 has to be str or None"),
        ({"engine": 3}, r"engine has to be a dict, not 3"),
        ({"seed": "x"}, r"seed='x' has to be int"),
    ],
)
def test_wrong_type(config_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(config_path, options)


@pytest.mark.parametrize(
    "key",
    [
        "train.epochs",
        "train.batch_size",
        "train.eval_interval",
        "train.checkpoint_interval",
        "train.keep_checkpoints",
        "sensitivity.num_samples",
        "sensitivity.batch_size",
        "model.num_classes",
    ],
)
def test_out_of_range(config_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}=0 has to be at least 1"):
        load_config(config_path, {key: 0})


def test_int_is_a_float(config_path: Path) -> None:
    assert load_config(config_path, {"train.lr": 1}).train.lr == 1.0


def test_custom_imports_come_from_the_file_alone(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run once, while the file is read; an option would come too late."""
    (config_path.parent / "own_file.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(config_path.parent)
    config_path.write_text(config_path.read_text() + 'custom_imports = dict(imports=["own_file"])\n')
    load_config(config_path)
    assert sys.modules.pop("own_file").LOADED
    with pytest.raises(UserError, match="--cfg-options custom_imports: imports come before options"):
        load_config(config_path, {"custom_imports.imports": ["other"]})
    config_path.write_text(config_path.read_text().replace('"own_file"', '"nowhere_at_all"'))
    with pytest.raises(UserError, match="nowhere_at_all"):
        load_config(config_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.py: no such config file; configs/ holds some"):
        load_config(tmp_path / "nowhere.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("train = dict(epochs=", r"broken\.py: can't be read as a config \(.*SyntaxError", id="syntax"),
        pytest.param("train = 1 / 0", r"broken\.py: .*ZeroDivisionError", id="raises"),
        pytest.param("_base_ = ['nowhere.py']", r"broken\.py: .*nowhere\.py", id="no such base"),
        pytest.param("seed = 0", r"config: \w+ is missing", id="section is missing"),
    ],
)
def test_unreadable_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("method = dict(_delete_=True, rank=2)", r"method\.type is missing"),
        ("data = dict(_delete_=True, num_train=3)", r"data\.type is missing"),
        ("train = dict(_delete_=True, lr=1e-3)", r"train\.epochs=None and train\.iterations=None: give one of the two"),
        ("train = dict(iterations=5)", r"train\.epochs=\d+ and train\.iterations=5: give one of the two"),
    ],
)
def test_missing_key(config_path: Path, line: str, message: str) -> None:
    path = config_path.with_name("derived.py")
    path.write_text(f"_base_ = ['{config_path.name}']\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine.type": "horovod"}, r"engine\.type='horovod' is unknown; known: ddp, fsdp, deepspeed"),
        ({"engine.type": "deepsped"}, r"engine\.type='deepsped' is unknown; did you mean 'deepspeed'\?"),
        ({"engine.zero_stage": 4}, r"engine\.zero_stage=4: choose one of 0, 1, 2, 3"),
        ({"method.type": "lorra"}, r"method\.type='lorra' is unknown; did you mean 'lora'\?"),
        ({"method.ranks": 3}, r"method\.ranks is unknown; did you mean 'rank'\?"),
        ({"method.type": "lora"}, r"method\.(structured|budget|alpha|beta) is unknown"),
        ({"method.rank": "x"}, r"method\.rank='x' has to be int"),
    ],
)
def test_checked_before_anything_is_built(config_path: Path, options: dict[str, Any], message: str) -> None:
    config = load_config(config_path, options)
    with pytest.raises(UserError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.type": "digit"}, r"data\.type='digit' is unknown; did you mean 'digits'\?"),
        ({"data.num_trains": 3}, r"data\.num_trains is unknown; did you mean 'num_train'\?"),
        ({"data.num_train": "x"}, r"data\.num_train='x' has to be int"),
        ({"data.num_train": 1797}, r"data\.num_train=1797 has to lie between 1 and 1796"),
        ({"data.num_train": 0}, r"data\.num_train=0 has to lie between 1 and 1796"),
        ({"model.num_classes": 7}, r"model\.num_classes=7, but data\.type='digits' has 10"),
    ],
)
def test_data_section(config_path: Path, options: dict[str, Any], message: str) -> None:
    config = load_config(config_path, options)
    with pytest.raises(UserError, match=message):
        build_task(config.data, config.model.num_classes)


def test_configs_that_ship_are_in_order() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs").glob("[!_]*/[!_]*.py"))
    assert len(paths) >= 4
    suites = [path for path in paths if is_suite(path)]
    assert len(suites) >= 6
    for path in paths:
        if path not in suites:
            check_config(load_config(path))
    for path in suites:
        # tests/test_tables.py has those of the paper's tables, whose members differ in nothing that is checked.
        for member in load_suite(path, {}).members if path.parent.name != "paper" else ():
            check_config(member.config)


@pytest.mark.parametrize("section", ["model", "data"])
def test_normalisation(config_path: Path, section: str) -> None:
    """Refused before anything is read, whatever the data."""
    for value, message in (("imagnet", "'imagnet' is unknown; known: 'imagenet'"), ({"mean": [0.5]}, "exactly mean")):
        with pytest.raises(UserError, match=rf"{section}\.normalize=.*{message}"):
            load_config(config_path, {f"{section}.normalize": value})
    values = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = load_config(config_path, {f"{section}.normalize": values})
    assert (config.model.normalize if section == "model" else config.data["normalize"]) == values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.lr": -1.0}, r"train\.lr=-1\.0 has to be above 0"),
        ({"train.clip_norm": -1.0}, r"train\.clip_norm=-1\.0 has to be above 0"),
        ({"train.weight_decay": -0.1}, r"train\.weight_decay=-0\.1 has to be 0 or more"),
        ({"train.warmup_epochs": 99.0}, r"train\.warmup_epochs=99\.0 is more than train\.epochs"),
        ({"seed": 2**31}, r"seed=2147483648 has to lie between"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(ROOT / "configs" / "quickstart" / "digits_spt_lora.py", options)
