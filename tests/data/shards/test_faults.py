"""Damaged shards: what is good arrives, what is not is named, and nothing is lost in silence."""

import logging
import time
from functools import partial
from pathlib import Path

import pytest

from spt_dist.data.shards.openers import open_stream
from tests.data.shards.shards_for_tests import open_set, read, sample_files, tar_of, write_shard, write_shards

NUM_SAMPLES = 10
SAMPLES = [sample_files(index) for index in range(NUM_SAMPLES)]
GOOD = tar_of(file for files in SAMPLES for file in files)


def start_of(position: int) -> int:
    """Where the headers of a sample begin, by laying out the blocks."""
    blocks = sum(1 + -(-len(content) // 512) for files in SAMPLES[:position] for _, content in files)
    return 512 * blocks


def replaced(start: int, content: bytes) -> bytes:
    return GOOD[:start] + content + GOOD[start + len(content) :]


HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>".ljust(2048)

# What the file is instead; which samples can still be read; what the error of the first other says.
FAULTS: dict[str, tuple[bytes, list[int], str]] = {
    "cut in a payload": (GOOD[: start_of(4) + 512 + 5], [0, 1, 2, 3], "cut off in the content of '000004.jpg'"),
    "cut in padding": (GOOD[: start_of(4) + 512 + 30], [0, 1, 2, 3], "cut off at byte"),
    "cut in a header": (GOOD[: start_of(4) + 100], [0, 1, 2, 3], "cut off at byte"),
    "cut behind a sample": (GOOD[: start_of(4)], [0, 1, 2, 3], "cut off at byte"),
    "cut between a sample's files": (GOOD[: start_of(4) + 1024], [0, 1, 2, 3], "cut off at byte"),
    "zeroed header": (replaced(start_of(4), bytes(512)), [0, 1, 2, 3], "the mark of its end stands at byte"),
    "garbled header": (replaced(start_of(4), b"\x17" * 512), [0, 1, 2, 3], "is damaged"),
    "zeroed header within a sample": (
        replaced(start_of(4) + 1024, bytes(512)),
        [0, 1, 2, 3],
        "the mark of its end stands at byte",
    ),
    "flipped bit": (
        replaced(start_of(4) + 512, b"\x35"),
        [0, 1, 2, 3, 5, 6, 7, 8, 9],
        "not what the index has a checksum of",
    ),
    "HTML page": (HTML, [], "no tar file; it begins with b'<!DOCTYPE html><'"),
    "empty": (b"", [], "it is empty"),
    "nothing but an end": (bytes(10240), [], "the mark of its end stands at byte 0"),
    "another shard": (tar_of(file for files in SAMPLES[1:] for file in files), [], "not what the index has"),
    "two samples changed places": (
        tar_of(file for i in (0, 1, 3, 2, 4, 5, 6, 7, 8, 9) for file in SAMPLES[i]),
        [0, 1, 4, 5, 6, 7, 8, 9],
        "not what the index has",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("epoch", [None, 0])
@pytest.mark.parametrize("scheme", ["", "pipe:"])
def test_what_is_good_arrives_and_the_rest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, epoch: int | None, scheme: str
) -> None:
    monkeypatch.setattr("spt_dist.data.shards.lane._PAUSES", ())
    content, good, message = FAULTS[fault]
    folder = write_shard(tmp_path, SAMPLES, content)
    location = f"pipe:cat {folder}/{{}}" if scheme else str(folder)
    samples = open_set(location, lanes=2, window=6)
    order = samples.order(epoch).tolist()
    found = dict(zip(order, read(samples, epoch, order), strict=True))
    assert [index for index in range(NUM_SAMPLES) if isinstance(found[index], int)] == good
    bad = [index for index in range(NUM_SAMPLES) if index not in good]
    for index in good:
        assert found[index] == index
    for index in bad:
        assert f"{tmp_path}/train-000000.tar: sample {index} of 10" in str(found[index])
    assert message in str(found[bad[0]])


@pytest.mark.parametrize("size", range(0, len(GOOD), 257))
def test_a_cut_anywhere_loses_exactly_what_is_behind_it(tmp_path: Path, size: int) -> None:
    found = read(open_set(write_shard(tmp_path, SAMPLES, GOOD[:size])), None, range(NUM_SAMPLES))
    whole = [index for index in range(NUM_SAMPLES) if last_byte_of(index) <= size]
    assert [number for number in found if isinstance(number, int)] == whole


def last_byte_of(position: int) -> int:
    """Where the content of a sample's last file ends."""
    return start_of(position + 1) - 512 + len(SAMPLES[position][-1][1])


def test_every_flipped_bit_of_a_sample_is_noticed(tmp_path: Path) -> None:
    clean = set(range(NUM_SAMPLES))
    for place in range(start_of(3), start_of(4), 61):
        content = replaced(place, bytes([GOOD[place] ^ 4]))
        found = read(open_set(write_shard(tmp_path, SAMPLES, content)), None, range(NUM_SAMPLES))
        numbers = {number for number in found if isinstance(number, int)}
        assert numbers <= clean and {0, 1, 2} <= numbers
        in_padding_or_unused = 3 in numbers
        # A header's own checksum, or ours, sees all but what carries no meaning.
        if in_padding_or_unused:
            assert content[place] != GOOD[place] and numbers == clean


def test_a_shard_that_vanishes_is_an_error_of_each_of_its_samples(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [4, 4, 4])
    samples = open_set(folder)
    (folder / "train-000001.tar").unlink()
    found = read(samples, None, range(12))
    assert found[:4] + found[8:] == [0, 1, 2, 3, 8, 9, 10, 11]
    for position, message in enumerate(found[4:8]):
        assert message == (
            f"{folder}/train-000001.tar: sample {position} of 4: it can't be opened (No such file or directory)"
        )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("head -c 3000 {folder}/{{}}; exit 7", "(the command failed with status 7)"),
        ("head -c 3000 {folder}/{{}}; kill -9 $$", "(the command failed with status -9)"),
        ("no-such-command-anywhere {{}}", "(the command failed with status 127)"),
    ],
)
def test_a_command_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.setattr("spt_dist.data.shards.lane._PAUSES", ())
    folder = write_shard(tmp_path, SAMPLES)
    samples = open_set(folder)
    samples._location = "pipe:" + command.format(folder=folder)
    found = read(samples, None, range(NUM_SAMPLES))
    assert message in str(found[-1]) and "train-000000.tar" in str(found[-1])
    read_by_hand = [index for index in range(NUM_SAMPLES) if last_byte_of(index) <= 3000 and "no-such" not in command]
    assert [number for number in found if isinstance(number, int)] == read_by_hand


def test_a_break_in_the_middle_of_a_long_transfer_is_noticed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_dist.data.shards.lane._PAUSES", ())
    # More than a pipe holds, so that the command waits to be read.
    content = replaced(start_of(4), b"\x17" * 512) + bytes(10**6)
    write_shard(tmp_path, SAMPLES, content)
    start = time.monotonic()
    found = read(open_set(f"pipe:cat {tmp_path}/{{}}", lanes=1), None, range(NUM_SAMPLES))
    assert found[:4] == [0, 1, 2, 3] and "is damaged" in str(found[4])
    # Half of the time after which a transfer counts as stalled.
    assert time.monotonic() - start < 30


def test_a_transfer_that_stalls_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_dist.data.shards.lane._PAUSES", ())
    monkeypatch.setattr("spt_dist.data.shards.lane.open_stream", partial(open_stream, stall_seconds=5))
    samples = open_set(write_shard(tmp_path, SAMPLES), lanes=1)
    samples._location = f"pipe:head -c {start_of(4)} {tmp_path}/{{}}; exec sleep 60"
    found = read(samples, None, range(NUM_SAMPLES))
    assert found[:4] == [0, 1, 2, 3]
    assert "the shard breaks off before it is complete: nothing has come for 5 s" in str(found[4])


def test_a_transfer_that_breaks_off_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("spt_dist.data.shards.lane._PAUSES", (0.0, 0.01))
    folder = write_shard(tmp_path, SAMPLES)
    tries = tmp_path / "tries"
    # Fails twice, in the middle of a sample and between two, and works from then on.
    script = tmp_path / "unreliable"
    cases = f"1) head -c {start_of(4) + 1024} $1; exit 1;; 2) head -c {start_of(7)} $1; exit 1;;"
    script.write_text(f"echo x >> {tries}; case $(wc -l < {tries}) in {cases} esac; cat $1")
    samples = open_set(folder, lanes=1)
    samples._location = f"pipe:sh {script} {folder}/{{}}"
    with caplog.at_level(logging.WARNING):
        assert read(samples, None, range(NUM_SAMPLES)) == list(range(NUM_SAMPLES))
    for record, pause in zip(caplog.records, ("0", "0.01"), strict=True):
        assert f"{folder}/train-000000.tar: the shard breaks off" in record.getMessage()
        assert f"(the command failed with status 1); it is begun again in {pause} s" in record.getMessage()
    assert tries.read_text().split() == ["x"] * 3
