"""Reading suites."""

from pathlib import Path

import pytest

from spt_dist import UserError
from spt_dist.config import load_config
from spt_dist.suites import is_suite, load_suite

MEMBER = """model = dict(name="vit_tiny_patch16_224", num_classes=10)
data = dict(type="digits", seed={seed})
method = dict(type="spt", budget=500, structured="lora", rank=4)
train = dict(epochs=3, lr=0.1)
"""
SUITE = """suite = dict(groups=dict(low=["a.py", "b.py"], high=["c.py"]), published="vtab")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three members and a suite of them, ``all.py``."""
    for seed, name in enumerate("abc"):
        (tmp_path / f"{name}.py").write_text(MEMBER.format(seed=seed))
    return write(tmp_path, "")


def write(folder: Path, more: str, suite: str = SUITE) -> Path:
    (folder / "all.py").write_text(suite + more)
    return folder


def test_members_keep_their_own_and_write_below_the_suite(folder: Path) -> None:
    suite = load_suite(folder / "all.py", {})
    assert [(member.name, member.group) for member in suite.members] == [("a", "low"), ("b", "low"), ("c", "high")]
    assert suite.groups == {"low": ["a", "b"], "high": ["c"]}
    assert suite.published == "vtab"
    assert suite.work_dir == Path(f"work_dirs/{folder.name}_all")
    for seed, member in enumerate(suite.members):
        assert member.config.data["seed"] == seed
        assert member.config.method == {"type": "spt", "budget": 500, "structured": "lora", "rank": 4}
        assert member.config.work_dir == str(suite.work_dir / member.name)


def test_the_suite_changes_its_members_and_the_command_line_both(folder: Path) -> None:
    write(folder, 'train = dict(lr=0.2, batch_size=16)\nmethod = dict(type="lora", rank=2, targets=["q"])\n')
    for member in load_suite(folder / "all.py", {"train.batch_size": 8, "method.rank": 3}).members:
        train = member.config.train
        assert (train.epochs, train.lr, train.batch_size) == (3, 0.2, 8)
        assert member.config.method == {"type": "lora", "rank": 3, "targets": ["q"]}


def test_a_method_without_a_type_is_merged(folder: Path) -> None:
    write(folder, "method = dict(budget=900)\n")
    methods = [member.config.method for member in load_suite(folder / "all.py", {}).members]
    assert methods == [{"type": "spt", "budget": 900, "structured": "lora", "rank": 4}] * 3


def test_some_of_the_tasks(folder: Path) -> None:
    suite = load_suite(folder / "all.py", {}, "elsewhere", ["c", "a"])
    assert [member.name for member in suite.members] == ["a", "c"]
    assert suite.groups == {"low": ["a", "b"], "high": ["c"]}
    assert suite.members[1].config.work_dir == str(Path("elsewhere", "c"))


@pytest.mark.parametrize(
    ("suite", "more", "message"),
    [
        ("suite = 3\n", "", r"suite=3 has to be a dict"),
        ("suite = dict(group=dict())\n", "", r"suite\.group.*groups"),
        ("suite = dict(groups=dict(low='a.py'))\n", "", r"suite\.groups\['low'\]='a\.py'"),
        ("suite = dict(groups=dict(low=['a.py', 'a.py']))\n", "", r"names a config twice"),
        ("suite = dict(groups=dict(low=['d.py']))\n", "", r"d\.py: no such config file"),
        (SUITE, "train = dict(epoch=3)\n", r"train\.epoch.*epochs"),
    ],
)
def test_mistakes_are_told(folder: Path, suite: str, more: str, message: str) -> None:
    write(folder, more, suite)
    with pytest.raises(UserError, match=message):
        load_suite(folder / "all.py", {})


def test_an_unknown_task_is_refused_with_the_nearest(folder: Path) -> None:
    (folder / "cifar.py").write_text(MEMBER.format(seed=0))
    write(folder, "", "suite = dict(groups=dict(low=['cifar.py']))\n")
    with pytest.raises(UserError, match=r"--tasks='cifr'.*cifar"):
        load_suite(folder / "all.py", {}, None, ["cifr"])


def test_a_suite_is_no_task_and_a_task_no_suite(folder: Path) -> None:
    assert is_suite(folder / "all.py")
    assert not is_suite(folder / "a.py")
    with pytest.raises(UserError, match=r"all\.py: is a suite"):
        load_config(folder / "all.py")
