"""Shards from a web server, an object store's command, and a pipe: each the real thing, on this machine."""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from spt_dist import UserError
from spt_dist.data.shards import lane, openers
from spt_dist.data.shards.index import ShardIndex
from spt_dist.data.shards.openers import open_stream, read_whole, shown
from spt_dist.data.shards.require import require_shards
from tests.data.shards.shards_for_tests import open_set, read, write_shards

SIZES = [6, 9, 5]
WHOLE = list(range(sum(SIZES)))


class Quiet(SimpleHTTPRequestHandler):
    """Serves files; of shards only the first ``most_bytes``, though it promises all, and falls silent then or ends."""

    most_bytes = 10**9
    cuts_left = 10**9
    silent_seconds = 0

    def log_message(self, *args: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        cut = self.path.endswith(".tar") and type(self).cuts_left > 0 and self.most_bytes < 10**9
        type(self).cuts_left -= cut
        outputfile.write(source.read(self.most_bytes if cut else -1))
        time.sleep(self.silent_seconds if cut else 0)
        self.close_connection = True


@contextmanager
def serving(folder: Path, **behaviour: int) -> Iterator[str]:
    handler = type("Handler", (Quiet,), behaviour)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the buckets of ``aws`` and ``gsutil``, which print what lies in it."""
    programs, buckets = tmp_path / "programs", tmp_path / "buckets"
    programs.mkdir(), buckets.mkdir()
    aws = f'[ "$1 $2 $4" = "s3 cp -" ] || exit 9\nexec cat "{buckets}/${{3#s3://}}"\n'
    gsutil = f'[ "$1" = cat ] || exit 9\nexec cat "{buckets}/${{2#gs://}}"\n'
    for name, script in (("aws", aws), ("gsutil", gsutil)):
        (programs / name).write_text(f"#!/bin/sh\n{script}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return buckets


def check_location(location: str) -> None:
    samples = open_set(location, lanes=3, window=9)
    require_shards(location, ShardIndex.load(location).split("train", location))
    for epoch in (None, 4):
        order = samples.order(epoch).tolist()
        assert read(samples, epoch, order) == order
        assert read(samples, epoch, order[7:]) == order[7:]


def test_http(tmp_path: Path) -> None:
    write_shards(tmp_path / "some where", SIZES)
    with serving(tmp_path) as url:
        check_location(f"{url}/some%20where")
        check_location(f"{url}/some%20where/?signature=a&b=c")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_object_stores(commands: Path, scheme: str) -> None:
    write_shards(commands / "bucket" / "it's here", SIZES)
    check_location(f"{scheme}://bucket/it's here")


def test_pipe(tmp_path: Path) -> None:
    write_shards(tmp_path, SIZES)
    check_location(f"pipe:cat {tmp_path}/{{}} | cat")


def test_a_server_that_cuts_every_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_dist.data.shards.lane._PAUSES", (0.0,))
    write_shards(tmp_path, SIZES)
    with serving(tmp_path, most_bytes=5000) as url:
        found = read(open_set(url, lanes=1), None, WHOLE)
    good = [number for number in found if isinstance(number, int)]
    assert 0 in good and 6 in good and 5 not in good, "the beginning of each shard arrives"
    # 18 is how curl says that less has come than was promised.
    assert all("(curl failed with status 18: less has come" in each for each in found if isinstance(each, str))
    assert f"{url}/train-000000.tar: sample 5 of 6" in str(found[5])


def test_a_server_that_cuts_one_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_dist.data.shards.lane._PAUSES", (0.0,))
    write_shards(tmp_path, SIZES)
    with serving(tmp_path, most_bytes=5000, cuts_left=1) as url:
        assert read(open_set(url, lanes=1), None, WHOLE) == WHOLE


def test_a_server_that_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    stream = open_stream(f"http://127.0.0.1:{server.getsockname()[1]}", "train-000000.tar", stall_seconds=0.2)
    with pytest.raises(TimeoutError, match=r"nothing has come for 0 s"):
        stream.read(512)
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 30, "the command that waits is ended"
    server.close()


def test_a_transfer_that_falls_silent_is_begun_again_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("spt_dist.data.shards.lane._PAUSES", (0.0, 0.1))
    monkeypatch.setattr("spt_dist.data.shards.lane.open_stream", partial(open_stream, stall_seconds=5.0))
    write_shards(tmp_path, SIZES)
    with serving(tmp_path, most_bytes=5000, cuts_left=2, silent_seconds=60) as url:
        samples = open_set(url, lanes=1)
        samples._location = url.replace("http://", "http://me:secret@")
        with caplog.at_level(logging.WARNING):
            assert read(samples, None, WHOLE) == WHOLE
    why = "the shard breaks off before it is complete: nothing has come for 5 s"
    assert [record.getMessage() for record in caplog.records] == [
        f"{url}/train-000000.tar: {why}; it is begun again in {pause} s" for pause in ("0", "0.1")
    ]


def test_a_dead_source_is_told_before_a_run_without_progress_is_ended() -> None:
    attempts = len(lane._PAUSES) + 1
    assert attempts * openers.STALL_SECONDS + sum(lane._PAUSES) < 600 / 2


def test_a_missing_file_is_named_with_the_status(tmp_path: Path) -> None:
    with serving(tmp_path) as url, pytest.raises(UserError) as caught:
        ShardIndex.load(url)
    why = "curl failed with status 22: the server answers with an error, such as 404"
    assert str(caught.value) == f"{url}/index.json: can't be read ({why})"
    with pytest.raises(UserError, match=r"/index.json: can't be read \(No such file or directory\)"):
        ShardIndex.load(str(tmp_path))


def test_a_server_that_refuses_or_speaks_no_tls_is_named(tmp_path: Path) -> None:
    with serving(tmp_path) as url, pytest.raises(UserError, match=r"\(curl failed with status 35: the TLS handshake"):
        ShardIndex.load(url.replace("http", "https"))
    # Nobody listens there any more.
    with pytest.raises(UserError, match=r"\(curl failed with status 7: the connection is refused\)"):
        ShardIndex.load(url)


@pytest.mark.parametrize(
    ("location", "status", "message"),
    [
        ("https://host", 6, "curl failed with status 6: the host is not found"),
        ("https://host", 28, "curl failed with status 28: the server is too slow"),
        ("https://host", 56, "curl failed with status 56: the transfer is broken off"),
        ("https://host", 60, "curl failed with status 60: the server's TLS certificate can't be verified"),
        ("https://host", 92, "curl failed with status 92"),
        ("s3://bucket", 7, "aws failed with status 7"),
        ("gs://bucket", 7, "gsutil failed with status 7"),
        ("gs://bucket", 127, "gsutil failed with status 127: is gsutil installed?"),
        ("pipe:exit 127; echo {}", 127, "the command failed with status 127"),
    ],
)
def test_what_failed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, status: int, message: str
) -> None:
    for name in ("curl", "aws", "gsutil"):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError) as caught:
        read_whole(location, "index.json", 1)
    assert str(caught.value) == f"{shown(location, 'index.json')}: can't be read ({message})"


def test_reading_goes_on_where_it_was(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(content)
    for location in (str(tmp_path), f"pipe:cat {tmp_path}/{{}}"):
        stream = open_stream(location, "file")
        assert stream.read(3) == content[:3]
        stream.skip(1_500_000)
        assert stream.read(70_001) == content[1_500_003:1_570_004]
        assert stream.read(10**9) == content[1_570_004:]
        assert stream.read(1) == b"" and stream.failure() == ""
        stream.skip(5)
        stream.close()
        stream.close()


def test_a_stream_can_be_closed_at_any_time() -> None:
    stream = open_stream("pipe:yes {}", "no")
    assert stream.read(6) == b"no\nno\n"
    stream.close()


def test_files_that_are_too_large_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(11))
    assert read_whole(str(tmp_path), "file", 11) == bytes(11)
    for location in (str(tmp_path), "pipe:yes {}"):
        with pytest.raises(UserError, match="is larger than 10 bytes"):
            read_whole(location, "file", 10)


@pytest.mark.parametrize(
    ("location", "message"),
    [("ftp://host/x", "ftp://host/x: shards are read from folders and from http://"), ("pipe:cat x", "has to have {}")],
)
def test_other_locations_are_refused(location: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_stream(location, "index.json")


def test_secrets_in_urls_are_not_shown() -> None:
    assert shown("https://me:secret@host:1/a/?token=secret", "b.tar") == "https://host:1/a/b.tar"
    assert shown("/a/b", "c.tar") == "/a/b/c.tar"
    assert openers.is_local("/a/pipe:b") and not openers.is_local("s3://a")
