"""Suites: several tasks' configs that are run one after another, and compared in one table.

A suite is a config file with a section ``suite``; whatever else it has changes its members:

    suite = dict(
        groups=dict(natural=["cifar.py", "dtd.py"], structured=["clevr_count.py"]),
        published="vtab",
    )
    method = dict(type="lora", rank=8, targets=["q", "v"])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spt_dist.config import check_arguments, lookup, make_config, read_values
from spt_dist.errors import UserError
from spt_dist.sections import RunConfig


@dataclass(frozen=True)
class Member:
    """One task of a suite.

    Attributes:
        name: stem of its config's file.
        group: which of the suite's groups it belongs to.
        path: the file.
        config: with what the suite and the command line change; writes below the suite's work dir.
    """

    name: str
    group: str
    path: Path
    config: RunConfig


@dataclass(frozen=True)
class Suite:
    """Tasks that are compared in one table.

    Attributes:
        path: the suite's file.
        work_dir: has a folder for each member.
        groups: name of a group -> names of its members; all of them, whichever are run.
        published: which published results the table shows beside ours, see ``report.published``; "" for none.
        members: those to be run.
    """

    path: Path
    work_dir: Path
    groups: dict[str, list[str]]
    published: str
    members: list[Member]


def is_suite(path: str | Path) -> bool:
    """Whether a config file is of a suite.

    Raises:
        UserError: no such file, or it can't be read.
    """
    return "suite" in read_values(Path(path))


def load_suite(
    path: str | Path, options: Mapping[str, Any], work_dir: str | None = None, only: Sequence[str] = ()
) -> Suite:
    """Read a suite and the configs of its members.

    Args:
        path: the suite's file. Its sections are merged into the members'; a ``method`` with a type replaces theirs.
        options: ``--cfg-options``, for every member.
        work_dir: instead of the file's, which is ``work_dirs/FOLDER_STEM`` where it says none.
        only: names of the members to be run; all where it is empty.

    Raises:
        UserError: as ``load_config``, of the suite or a member; or a member of ``only`` does not exist.
    """
    path = Path(path)
    values = read_values(path)
    groups, published = _read_section(values.pop("suite"), path)
    own = work_dir or values.pop("work_dir", None) or f"work_dirs/{path.absolute().parent.name}_{path.stem}"
    files = {Path(file).stem: (group, path.parent / file) for group, named in groups.items() for file in named}
    if len(files) != sum(map(len, groups.values())):
        raise UserError(f"{path}: suite.groups names a config twice")
    for name in only:
        lookup("--tasks", name, files)
    members = []
    for name, (group, file) in files.items():
        if not only or name in only:
            config = _member_config(file, values, options)
            members.append(Member(name, group, file, replace(config, work_dir=str(Path(own, name)))))
    names = {group: [Path(file).stem for file in named] for group, named in groups.items()}
    return Suite(path, Path(own), names, published, members)


def _read_section(section: Any, path: Path) -> tuple[dict[str, list[str]], str]:
    """The section ``suite``."""
    if not isinstance(section, dict):
        raise UserError(f"{path}: suite={section!r} has to be a dict with `groups`")

    def suite(groups: dict[str, Any], published: str = "") -> None: ...

    check_arguments(suite, section, "suite")
    groups = section["groups"]
    for group, named in groups.items():
        if not isinstance(named, list) or not named or not all(isinstance(file, str) for file in named):
            raise UserError(f"{path}: suite.groups[{group!r}]={named!r} has to be a list of config files")
    return groups, section.get("published", "")


def _member_config(file: Path, changes: dict[str, Any], options: Mapping[str, Any]) -> RunConfig:
    changes = dict(changes)
    method = changes.get("method")
    if isinstance(method, dict) and "type" in method:
        changes["method"] = method | {"_delete_": True}
    return make_config(read_values(file, changes, options), file)
