"""The rules of the layout: who may import whom, and who may look at the environment."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "spt_dist"
# A folder imports only from itself and from what stands before it.
ORDER = [
    (
        "errors",
        "exits",
        "compat",
        "background",
        "files",
        "ranks",
        "hosts",
        "tables",
        "progress",
        "normalisation",
        "sections",
        "config",
        "suites",
        "jobs",
    ),
    ("models", "data"),
    ("sensitivity",),
    ("allocation",),
    ("tuning",),
    ("parallel", "evaluation"),
    ("training",),
    ("report",),
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_rooms(path: Path) -> set[str]:
    """Top-level parts of spt_dist that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spt_dist":
            names.add([*node.module.split("."), "the package itself"][1])
        elif isinstance(node, ast.Import):
            names |= {"the package itself" for alias in node.names if alias.name.split(".")[0] == "spt_dist"}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for room in imported_rooms(path) - {own}:
        assert LEVEL.get(room, 99) <= LEVEL[own], f"{own} imports {room}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_parallel_looks_at_the_environment(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] != "parallel":
        text = path.read_text()
        assert "os.environ" not in text
        assert "getenv" not in text
        assert "sys.argv" not in text
