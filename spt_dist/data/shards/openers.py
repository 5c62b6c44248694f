"""Opening files where they lie: in a folder, on a web server, in an object store, behind a command."""

import os
import select
import shlex
import subprocess
from abc import ABC, abstractmethod
from itertools import islice
from pathlib import Path
from typing import IO, Final
from urllib.parse import urlsplit, urlunsplit

from webdataset.gopen import Pipe, gopen, set_options

from spt_dist.errors import UserError

# gopen's own curl tries for more than a minute when a host is not found or a server busy: it would count as stalled.
_CURL: Final = "curl --connect-timeout 15 --retry 2 --retry-delay 2 -f -s -L {}"
_COMMANDS: Final = {"http": _CURL, "https": _CURL, "s3": "aws s3 cp {} -", "gs": "gsutil cat {}"}
_CURL_STATUSES: Final = {
    6: "the host is not found",
    7: "the connection is refused",
    18: "less has come than the server promised",
    22: "the server answers with an error, such as 404",
    28: "the server is too slow",
    35: "the TLS handshake fails",
    52: "the server answers nothing",
    56: "the transfer is broken off",
    60: "the server's TLS certificate can't be verified",
}
_NOT_FOUND: Final = 127  # says the shell
_SCHEMES: Final = "http://, https://, s3://, gs:// and pipe:"
_PIECE: Final = 2**20
_MOST_AT_ONCE: Final = 2**16  # what fits in a pipe
# Three attempts have to be over well before a run without progress is ended (engine.timeout, 600 s).
STALL_SECONDS: Final = 60.0


class Stream(ABC):
    """The bytes of a file, from its beginning to its end. What it raises is an ``OSError``."""

    @abstractmethod
    def read(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer where the file ends."""

    @abstractmethod
    def skip(self, count: int) -> None:
        """Leave out the next ``count`` bytes, or those that there are."""

    @abstractmethod
    def failure(self) -> str:
        """What went wrong with the transfer; "" for nothing, or while there may be more to read."""

    @abstractmethod
    def close(self) -> None:
        """Give up what it holds."""


class _LocalStream(Stream):
    def __init__(self, path: str) -> None:
        self._file: IO[bytes] = open(path, "rb")  # noqa: SIM115  # closed by `close`

    def read(self, count: int) -> bytes:
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._file.seek(count, os.SEEK_CUR)

    def failure(self) -> str:
        return ""

    def close(self) -> None:
        self._file.close()


class _PipeStream(Stream):
    """What a command prints. ``program`` is what it is called in messages."""

    def __init__(self, command: str, program: str, stall_seconds: float) -> None:
        # Unbuffered: a poll knows nothing of what lies in a buffer.
        self._pipe: Pipe = gopen(f"pipe:{command}", "rb", bufsize=0)
        self._program, self._stall_seconds = program, stall_seconds
        # Its own check ends a read for which there is data left, or does not: it depends on which process is faster.
        set_options(self._pipe, ignore_errors=True)
        self._descriptor: int = self._pipe.stream.fileno()
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)
        self._ready = memoryview(b"")
        self._is_at_end = False

    def read(self, count: int) -> bytes:
        pieces, missing = [], count
        while missing and (piece := self._some(missing)):
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def skip(self, count: int) -> None:
        while count and (piece := self._some(count)):
            count -= len(piece)

    def failure(self) -> str:
        if not self._is_at_end:
            # A command that waits until it is read does not end.
            return ""
        try:
            status = self._pipe.proc.wait(self._stall_seconds)
        except subprocess.TimeoutExpired:
            return f"{self._program} has not ended {self._stall_seconds:.0f} s after its output"
        return _failure(self._program, status) if status else ""

    def close(self) -> None:
        # It may be waiting for something other than to be read.
        self._pipe.proc.kill()
        self._pipe.close()

    def _some(self, count: int) -> memoryview:
        """At least one byte, at most ``count``; none at the end."""
        if not self._ready:
            if not self._poll.poll(self._stall_seconds * 1000):
                raise TimeoutError(f"nothing has come for {self._stall_seconds:.0f} s")
            # Many small reads would be many calls of the system.
            self._ready = memoryview(os.read(self._descriptor, _MOST_AT_ONCE))
            self._is_at_end = not self._ready
        piece, self._ready = self._ready[:count], self._ready[count:]
        return piece


def is_local(location: str) -> bool:
    """Whether a location is a folder."""
    return not location.startswith("pipe:") and "://" not in location


def shown(location: str, name: str) -> str:
    """What a file is called in messages: its path, its URL without what may be secret in it, or its command."""
    url = _url(location, name)
    if is_local(location) or url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def open_stream(location: str, name: str, stall_seconds: float = STALL_SECONDS) -> Stream:
    """Open a file for reading.

    Args:
        location: a folder, ``http://``, ``https://``, ``s3://`` or ``gs://`` with what stands before the name, or
            ``pipe:COMMAND``, in which ``{}`` stands for the name.
        name: of the file.
        stall_seconds: how long to wait for what a command or a server does not send.

    Raises:
        UserError: a location of another kind.
        OSError: a file that can't be opened. A command that fails is noticed only when it is read.
    """
    url = _url(location, name)
    if is_local(location):
        return _LocalStream(url)
    scheme, _, rest = url.partition(":")
    if scheme == "pipe":
        return _PipeStream(rest, "the command", stall_seconds)
    command = _COMMANDS[scheme]
    return _PipeStream(f"exec {command.format(shlex.quote(url))}", command.split()[0], stall_seconds)


def read_whole(location: str, name: str, most_bytes: int) -> bytes:
    """The content of a file.

    Args:
        location, name: as for ``open_stream``.
        most_bytes: how large it may be.

    Raises:
        UserError: it can't be read, or is larger.
    """
    path = shown(location, name)
    try:
        stream = open_stream(location, name)
        try:
            # In pieces: a file that is asked for a gigabyte makes room for it.
            pieces = iter(lambda: stream.read(_PIECE), b"")
            content = b"".join(islice(pieces, most_bytes // _PIECE + 1))
            failure = "" if len(content) > most_bytes else stream.failure()
        finally:
            stream.close()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from error
    if failure:
        raise UserError(f"{path}: can't be read ({failure})")
    if len(content) > most_bytes:
        raise UserError(f"{path}: is larger than {most_bytes:,} bytes")
    return content


def _url(location: str, name: str) -> str:
    if location.startswith("pipe:"):
        if "{}" not in location:
            raise UserError(f"{location}: the command has to have {{}} where the name of the file shall stand")
        return location.replace("{}", shlex.quote(name))
    if is_local(location):
        return str(Path(location) / name)
    parts = urlsplit(location)
    if parts.scheme not in _COMMANDS:
        raise UserError(f"{location}: shards are read from folders and from {_SCHEMES}")
    # What a signed URL has behind its path stays there.
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _failure(program: str, status: int) -> str:
    meaning = _CURL_STATUSES.get(status, "") if program == "curl" else ""
    if status == _NOT_FOUND and program != "the command":
        meaning = f"is {program} installed?"
    return f"{program} failed with status {status}" + f": {meaning}" * bool(meaning)
