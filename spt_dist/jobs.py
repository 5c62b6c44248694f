"""Job scripts: those of ``launch/slurm/`` with the directives and the arguments of one job in them."""

import re
import shlex
from collections.abc import Mapping, Sequence

from spt_dist.errors import UserError

_DIRECTIVE = re.compile(r"#SBATCH --([\w-]+)(?:=(.*))?")
_PLAIN = re.compile(r"[\w@%+=:,./\[\]-]*")
_OPTION = re.compile(r"[a-z][a-z-]*")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_NO_LIMIT = ("-1", "infinite", "unlimited")


def render_script(
    template: str,
    directives: Mapping[str, str | None],
    variables: Mapping[str, str],
    arguments: Sequence[str],
) -> str:
    """A job script that needs nothing else on the command line of ``sbatch``.

    Args:
        template: a script of ``launch/slurm/``: comments, directives, and commands that take ``"$@"``.
        directives: long options of ``sbatch`` without the dashes -> value, ``None`` for one that takes none. They come
            in the place of the template's of the same name, or behind its own; ``no-requeue`` in that of ``requeue``.
        variables: shell variables that the commands read; the ranks don't see them.
        arguments: what ``"$@"`` shall be.

    Raises:
        UserError: a directive's name is no long option, or its value has more than one line.
    """
    head, _, body = template.partition("\n\n")
    found = {match[1]: match[2] for match in map(_DIRECTIVE.fullmatch, head.splitlines()) if match}
    if "no-requeue" in directives:
        found.pop("requeue", None)
    lines = [head.splitlines()[0], "# Written by launch/submit.py; `sbatch` on this file submits the same job again."]
    lines += [_directive(name, value) for name, value in {**found, **directives}.items()]
    lines += ["", *(f"{name}={shlex.quote(value)}" for name, value in variables.items())]
    lines += [f"set -- {shlex.join(arguments)}", body]
    return "\n".join(lines)


def parse_directives(items: Sequence[str]) -> dict[str, str | None]:
    """``KEY=VALUE``, or ``KEY`` for an option without a value, as directives; dashes in front are taken too.

    Raises:
        UserError: a key is no long option of ``sbatch``.
    """
    directives: dict[str, str | None] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not _OPTION.fullmatch(name.removeprefix("--")):
            raise UserError(f"--sbatch {item}: has to be KEY=VALUE or KEY, as in mail-type=END or exclusive")
        directives[name.removeprefix("--")] = value if equals else None
    return directives


def array_indices(names: Sequence[str], only: Sequence[str], at_once: int | None) -> str:
    """``sbatch --array``: the places of the members to be run, and how many of them at once.

    Args:
        names: the suite's members.
        only: those to be run; all where it is empty.
        at_once: ``None`` for no limit.
    """
    places = [place for place, name in enumerate(names) if not only or name in only]
    is_range = places == list(range(places[0], places[-1] + 1))
    text = f"{places[0]}-{places[-1]}" if is_range else ",".join(map(str, places))
    return text + ("" if at_once is None else f"%{at_once}")


def time_limit(text: str) -> int | None:
    """Seconds of ``sbatch --time``, ``None`` for no limit.

    Args:
        text: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0, -1, INFINITE or UNLIMITED for no limit.

    Raises:
        UserError: it is none of these.
    """
    if text.lower() in _NO_LIMIT:
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(f"--time {text}: has to be M, M:S, H:M:S, D-H, D-H:M or D-H:M:S, as in 8:00:00 or 1-12")
    numbers = [int(number) for number in match.groups()[1:] if number is not None]
    if match["days"] is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        hours += 24 * int(match["days"])
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, *(*numbers, 0)[:2]
    return 3600 * hours + 60 * minutes + seconds or None


def plain_path(path: str) -> str:
    """A path for a directive in which nothing stands for a number, as ``%j`` does for that of the job.

    Raises:
        UserError: it has a backslash, which would switch off ``%j`` behind it.
    """
    if "\\" in path:
        raise UserError(
            f"{path}: has a backslash, by which SLURM takes %j in the name of a log as it stands; rename it"
        )
    return path.replace("%", "%%")


def _directive(name: str, value: str | None) -> str:
    if value is None:
        return f"#SBATCH --{name}"
    if "\n" in value:
        raise UserError(f"--{name} {value!r}: has to be one line")
    if not _PLAIN.fullmatch(value):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        value = f'"{escaped}"'
    return f"#SBATCH --{name}={value}"
