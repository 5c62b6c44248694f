"""Missing shards are found before a run, and told by all ranks alike."""

import logging
from pathlib import Path

import pytest

from spt_dist import UserError
from spt_dist.data.shards.index import ShardIndex
from spt_dist.data.shards.require import check_lanes, load_index, require_shards
from tests.data.shards.shards_for_tests import write_shards
from tests.data.shards.test_openers import serving
from tests.ranks import run_ranks

SIZES = [2] * 9


def refusal(location: str, index_of: str | None = None) -> str:
    """What the check says; "" for nothing."""
    try:
        require_shards(location, ShardIndex.load(index_of or location).split("train", location))
    except UserError as error:
        return str(error)
    return ""


def damage(folder: Path) -> None:
    for number in (1, 3, 7, 8):
        (folder / f"train-{number:06d}.tar").unlink()
    (folder / "train-000004.tar").write_bytes(b"<!DOCTYPE html>".ljust(600))
    (folder / "train-000005.tar").write_bytes(b"")


def test_local_shards_have_to_be_there_and_have_their_size(tmp_path: Path) -> None:
    write_shards(tmp_path, SIZES)
    assert refusal(str(tmp_path)) == ""
    damage(tmp_path)
    assert refusal(str(tmp_path)) == (
        f"6 of 9 shards can't be used: {tmp_path}/train-000001.tar: No such file or directory; "
        f"{tmp_path}/train-000003.tar: No such file or directory; "
        f"{tmp_path}/train-000004.tar has 600 bytes, not 10,240 as the index says; and 3 more"
    )


def test_remote_shards_have_to_begin_as_tar_files_do(tmp_path: Path) -> None:
    write_shards(tmp_path, SIZES)
    with serving(tmp_path) as url:
        assert refusal(url) == ""
        damage(tmp_path)
        gone = "curl failed with status 22: the server answers with an error, such as 404"
        assert refusal(url) == (
            f"6 of 9 shards can't be used: {url}/train-000001.tar: {gone}; "
            f"{url}/train-000003.tar: {gone}; "
            f"{url}/train-000004.tar: no tar file; it begins with b'<!DOCTYPE html> '; and 3 more"
        )
    assert f"cat {tmp_path}/train-000001.tar: the command failed with status 1" in refusal(f"pipe:cat {tmp_path}/{{}}")


def two_checks(folder: str, mine: list[str]) -> list[str]:
    """What ranks say to a folder with missing shards; and to an index of which each has another copy."""
    import torch.distributed as dist

    found = [refusal(folder)]
    try:
        load_index(mine[dist.get_rank()])
    except UserError as error:
        found.append(str(error))
    return found


@pytest.mark.distributed
def test_all_ranks_say_the_same(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "damaged", SIZES)
    damage(folder)
    write_shards(tmp_path / "a", [2])
    write_shards(tmp_path / "b", [3])
    first, second = run_ranks(two_checks, 2, str(folder), [str(tmp_path / "a"), str(tmp_path / "b")])
    assert first[0] == second[0] == refusal(str(folder)) != ""
    for found, name in ((first, "a"), (second, "b")):
        assert found[1] == f"{tmp_path}/{name}/index.json: is not the same on every rank; all have to read the same"
    first, second = run_ranks(two_checks, 2, str(folder), [str(tmp_path / "a"), str(tmp_path / "none")])
    assert first[1] == second[1] == f"{tmp_path}/none/index.json: can't be read (No such file or directory)"


def lanes_warned(lanes: int) -> list[str]:
    """What this rank logs."""
    logger, told = logging.getLogger("spt_dist.data.shards.require"), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    check_lanes(lanes, 10)
    return told


@pytest.mark.distributed
def test_lanes_that_ranks_have_to_share_are_told_once() -> None:
    assert run_ranks(lanes_warned, 2, 4) == [[], []]
    first, second = run_ranks(lanes_warned, 2, 3)
    assert second == []
    assert first == ["data.lanes=3 is no multiple of 2 ranks: several read the same; take 4"]


@pytest.mark.parametrize(("lanes", "window", "name"), [(0, 1, "lanes"), (1, 0, "window")])
def test_lanes_and_windows_below_one_are_refused(lanes: int, window: int, name: str) -> None:
    with pytest.raises(UserError, match=f"data.{name}=0"):
        check_lanes(lanes, window)
