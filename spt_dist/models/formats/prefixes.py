"""Names whose beginnings are others in timm, or tell where a tower is."""

from collections.abc import Container, Iterable, Mapping


def rename_prefix(name: str, renamed: Mapping[str, str]) -> str:
    """``name`` with the first of ``renamed``'s keys that it begins with replaced; as it is if it begins with none."""
    old = next((each for each in renamed if name.startswith(each)), "")
    return renamed.get(old, "") + name.removeprefix(old)


def find_prefix(names: Container[str], prefixes: Iterable[str], *needed: str) -> str | None:
    """The first of ``prefixes`` that ``names`` have before each of ``needed``."""
    return next((prefix for prefix in prefixes if all(prefix + name in names for name in needed)), None)
