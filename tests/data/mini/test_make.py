"""The mini-benchmark as files: VTAB-1k's layout, the same for the same seed, and nothing of it half there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spt_dist.config import check_arguments, load_config
from spt_dist.data.lists.vtab import VTAB_TASKS, read_vtab_list
from spt_dist.data.mini import make
from spt_dist.data.mini.make import DRAWERS, make_mini
from spt_dist.data.mini.tasks import MINI_TASKS, build_mini
from spt_dist.errors import UserError
from tests.launch.processes import snapshot

CONFIGS = Path(__file__).parents[3] / "configs" / "mini"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pictures, as what is said of many is said of few."""
    monkeypatch.setattr(make, "NUM_TRAIN", 12)
    monkeypatch.setattr(make, "NUM_VAL", 5)


def made(root: Path, **options: Any) -> Path:
    return make_mini(root, **{"tasks": ["sprites_loc", "grades"], "num_test": 7, "show_progress": False} | options)


def test_layout_is_that_of_vtab(tmp_path: Path) -> None:
    root = made(tmp_path / "new", tasks=["sprites_loc"])
    sizes = {"train800": 800, "val200": 200, "test": 7}
    files = {f"images/{name}/{number:06d}.png" for name, size in sizes.items() for number in range(size)}
    lists = {f"{name}.txt" for name in (*sizes, "train800val200")}
    assert set(snapshot(root / "sprites_loc")) == files | lists | {"mini.json"}
    for name, size in sizes.items():
        listed = read_vtab_list(root / "sprites_loc", name, 16)
        assert listed.files == [f"images/{name}/{number:06d}.png" for number in range(size)]
    both = [(root / "sprites_loc" / f"{name}.txt").read_text() for name in ("train800", "val200")]
    assert (root / "sprites_loc" / "train800val200.txt").read_text() == "".join(both)
    with Image.open(root / "sprites_loc/images/test/000003.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (32, 32))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("task", MINI_TASKS)
def test_every_task_is_drawn_and_read_back(task: str, tmp_path: Path) -> None:
    if task in ("photos", "textures"):
        pytest.importorskip("skimage")
    root = made(tmp_path, tasks=[task])
    built = build_mini(str(root), task)
    assert (built.num_train, built.num_val, built.num_classes) == (17, 7, MINI_TASKS[task].num_classes)
    pictures = {path: content for path, content in snapshot(root).items() if path.endswith(".png")}
    assert len(set(pictures.values())) == len(pictures) == 24, "no picture comes twice"


@pytest.mark.usefixtures("few")
def test_seed_says_it_all(tmp_path: Path) -> None:
    first, again, other = (snapshot(made(tmp_path / name, seed=seed)) for name, seed in (("a", 4), ("b", 4), ("c", 5)))
    assert first == again
    pictures, others = (
        {content for path, content in files.items() if path.endswith(".png")} for files in (first, other)
    )
    assert not pictures & others
    more = snapshot(made(tmp_path / "more", seed=4, num_test=9))
    images = {path: content for path, content in first.items() if path.endswith(".png")}
    assert images.items() < more.items(), "more pictures are more, not others"


@pytest.mark.usefixtures("few")
def test_what_is_there_is_left_and_what_was_cut_short_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def watched(task: str) -> Any:
        draw = DRAWERS[task]()

        def counting(rng: np.random.Generator, split: str, number: int) -> Any:
            calls.append(task)
            if broken and task == "grades" and split == "test":
                raise KeyboardInterrupt
            return draw(rng, split, number)

        return counting

    monkeypatch.setattr(make, "DRAWERS", {task: lambda task=task: watched(task) for task in DRAWERS})
    broken = True
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "root")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["sprites_loc"]
    broken, before = False, len(calls)
    made(tmp_path / "root")
    assert set(calls[before:]) == {"grades"}
    assert snapshot(tmp_path / "root") == snapshot(made(tmp_path / "whole"))


@pytest.mark.usefixtures("few")
def test_refusals(tmp_path: Path) -> None:
    made(tmp_path, tasks=["grades"])
    with pytest.raises(UserError, match=r"grades: was made with .*'seed': 0.*, not with .*'seed': 3.*another folder"):
        made(tmp_path, tasks=["grades"], seed=3)
    (tmp_path / "sprites_loc").mkdir()
    with pytest.raises(UserError, match=r"sprites_loc: is there already, and make_mini didn't make it"):
        made(tmp_path)
    with pytest.raises(UserError, match=r"grade.*did you mean|grade.*grades"):
        made(tmp_path, tasks=["grade"])
    with pytest.raises(UserError, match="--seed -1"):
        made(tmp_path, seed=-1)
    with pytest.raises(UserError, match="--num-test 0"):
        made(tmp_path, num_test=0)


def test_configs_are_those_of_the_tasks() -> None:
    # all.py and its like run every task.
    found = {path.stem for path in CONFIGS.glob("[!_]*.py") if not path.stem.startswith("all")}
    assert found == set(MINI_TASKS) == set(DRAWERS)
    for task, known in MINI_TASKS.items():
        config = load_config(CONFIGS / f"{task}.py")
        assert config.model.num_classes == known.num_classes
        assert (config.data["type"], config.data["task"]) == ("mini", task)
        check_arguments(build_mini, {key: value for key, value in config.data.items() if key != "type"}, "data")


def test_groups_are_those_of_vtab() -> None:
    groups = [task.group for task in MINI_TASKS.values()]
    assert list(dict.fromkeys(groups)) == list(dict.fromkeys(task.group for task in VTAB_TASKS.values()))
    assert min(groups.count(group) for group in groups) >= 2
