"""Files on hosts that see each other's and on hosts that don't: there, each rank has a folder of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spt_dist import UserError
from spt_dist.hosts import CHUNK_BYTES, rank_zeros_file, who_sees
from spt_dist.parallel.checkpoints import find_checkpoint
from spt_dist.ranks import from_all_ranks, host_first
from spt_dist.sensitivity.scores import Scores
from spt_dist.sensitivity.shards import FlatIndex, ScoreShard, shard_bounds
from tests.ranks import run_ranks
from tests.scores_for_tests import make_info

CONTENT = bytes(range(256)) * 3


def own_folder(folder: str, apart: list[int]) -> Path:
    """What this rank sees under one and the same name: those in ``apart`` are on a host of their own."""
    rank = from_all_ranks(None) and torch.distributed.get_rank()
    path = Path(folder, "apart" if rank in apart else "shared")
    path.mkdir(exist_ok=True)
    return path


def look(folder: str, apart: list[int]) -> tuple[list[bool], list[str]]:
    directory = own_folder(folder, apart) / "deep"
    seen = who_sees(directory)
    from_all_ranks(None)
    return seen, [path.name for path in directory.glob("*")]


@pytest.mark.distributed
@pytest.mark.parametrize(("apart", "seen"), [([], [True] * 3), ([1], [True, False, True])])
def test_who_sees(tmp_path: Path, apart: list[int], seen: list[bool]) -> None:
    assert run_ranks(look, 3, str(tmp_path), apart) == [(seen, [])] * 3


def fetch(folder: str, apart: list[int]) -> tuple[bytes, bool, bool]:
    """What this rank reads, whether from a copy, and whether a copy is left."""
    path = own_folder(folder, apart) / "file.bin"
    if torch.distributed.get_rank() == 0:
        path.write_bytes(CONTENT * (CHUNK_BYTES // len(CONTENT) + 2))
    from_all_ranks(None)
    with rank_zeros_file(path) as local:
        assert local.name == path.name
        opened = local.open("rb")
    # One rank of a host takes the copy away.
    from_all_ranks(None)
    with opened:
        return opened.read(), local != path, local != path and local.parent.exists()


@pytest.mark.distributed
@pytest.mark.parametrize("apart", [[], [1], [1, 2]])
def test_a_file_is_brought_to_those_who_do_not_see_it(tmp_path: Path, apart: list[int]) -> None:
    """It is longer than one message, and read on after the copy is gone."""
    expected = CONTENT * (CHUNK_BYTES // len(CONTENT) + 2)
    assert len(expected) > CHUNK_BYTES
    for rank, (content, copied, left) in enumerate(run_ranks(fetch, 3, str(tmp_path), apart)):
        assert content == expected
        assert copied == (rank in apart) and not left


def fetch_tensor(folder: str) -> list[float]:
    path = own_folder(folder, [1]) / "a.safetensors"
    if torch.distributed.get_rank() == 0:
        save_file({"a": torch.arange(3.0)}, path)
    with rank_zeros_file(path) as local:
        opened = safe_open(local, framework="pt")
    tensor: list[float] = opened.get_tensor("a").tolist()
    return tensor


@pytest.mark.distributed
def test_safetensors_are_read_on_after_the_copy_is_gone(tmp_path: Path) -> None:
    """As a checkpoint is, tensor by tensor."""
    assert run_ranks(fetch_tensor, 2, str(tmp_path)) == [[0.0, 1.0, 2.0]] * 2


def fetch_stale(folder: str) -> bytes:
    """A host has a file of that name, from another time."""
    path = own_folder(folder, [1]) / "file.bin"
    path.write_bytes(b"0123" if torch.distributed.get_rank() == 0 else b"abcd")
    with rank_zeros_file(path) as local:
        return local.read_bytes()


@pytest.mark.distributed
def test_another_file_of_the_same_name_and_size_is_not_taken(tmp_path: Path) -> None:
    assert run_ranks(fetch_stale, 2, str(tmp_path)) == [b"0123"] * 2


def fetch_nothing(folder: str) -> bool:
    path = own_folder(folder, [1]) / "file.bin"
    with rank_zeros_file(path) as local:
        return local == path


@pytest.mark.distributed
def test_what_rank_zero_lacks_is_not_brought(tmp_path: Path) -> None:
    assert run_ranks(fetch_nothing, 2, str(tmp_path)) == [True] * 2


def test_a_process_on_its_own(tmp_path: Path) -> None:
    with rank_zeros_file(tmp_path / "nothing") as local:
        assert local == tmp_path / "nothing"
    assert who_sees(tmp_path) == [True]
    assert host_first(lambda: 3) == 3


def save_and_load(folder: str) -> list[float]:
    index = FlatIndex(("a.weight", "a.bias"), ((3, 4), (3,)))
    start, stop = shard_bounds(15, 4, torch.distributed.get_rank())
    directory = own_folder(folder, [1, 2]) / "scores"
    Scores(ScoreShard(index, start, torch.arange(15.0)[start:stop].clone()), make_info()).save(directory)
    parts = from_all_ranks(Scores.load(directory).shard.values)
    return [float(value) for value in torch.cat(parts)]


@pytest.mark.distributed
def test_scores_of_all_hosts_are_written_where_rank_zero_is(tmp_path: Path) -> None:
    """And one process finds them whole there."""
    assert run_ranks(save_and_load, 4, str(tmp_path)) == [list(map(float, range(15)))] * 4
    assert not list((tmp_path / "apart").rglob("*.safetensors"))
    assert Scores.load(tmp_path / "shared" / "scores").shard.values.tolist() == list(map(float, range(15)))
    assert len(list((tmp_path / "shared" / "scores").iterdir())) == 5, "four parts and the index"


def count_calls(folder: str) -> tuple[int, int]:
    """How many had kept something when this rank's turn came, with the hosts of four ranks being a, a, b, b."""
    rank = torch.distributed.get_rank()
    torch.distributed.barrier()
    import spt_dist.ranks as ranks

    ranks.socket.gethostname = lambda: "aabb"[rank]  # type: ignore[assignment]

    def work() -> int:
        found = len(list(Path(folder).iterdir()))
        time.sleep(0.5 if rank in (0, 2) else 0)
        Path(folder, str(rank)).touch()
        return found

    return rank, host_first(work)


@pytest.mark.distributed
def test_one_rank_of_a_host_goes_first(tmp_path: Path) -> None:
    found = dict(run_ranks(count_calls, 4, str(tmp_path)))
    assert found[0] == 0 and found[2] == 1
    assert found[1] >= 2 and found[3] >= 2


def fail_on_rank_zero(mistake: bool) -> tuple[bool, str]:
    """Whether this rank began, and what it raised."""
    began = []

    def work() -> None:
        began.append(True)
        raise UserError("no such data") if mistake else KeyError("a bug")

    try:
        host_first(work)
    except Exception as error:
        return bool(began), repr(error)
    return bool(began), ""


@pytest.mark.distributed
@pytest.mark.parametrize(("mistake", "raised"), [(True, "UserError('no such data')"), (False, "KeyError('a bug')")])
def test_an_error_reaches_every_rank_and_no_other_begins(mistake: bool, raised: str) -> None:
    results = run_ranks(fail_on_rank_zero, 2, mistake)
    assert [began for began, _ in results] == [True, False]
    assert all(raised in text for _, text in results)


def test_a_signal_ends_the_process_while_the_work_goes_on() -> None:
    """Else the notice of a job's end would be lost in a download."""
    code = "import time\nfrom spt_dist.ranks import host_first\nprint(flush=True)\nhost_first(lambda: time.sleep(60))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0


def resume_where_rank_zero_was_not(folder: str, steps: list[int]) -> str:
    directory = own_folder(folder, [1])
    step = steps[torch.distributed.get_rank()]
    if step:
        (directory / "latest").write_text(f"step-{step:08d}.safetensors")
    try:
        return str(find_checkpoint("auto", directory))
    except UserError as error:
        return str(error)


@pytest.mark.distributed
def test_a_checkpoint_on_another_host_is_not_left_behind(tmp_path: Path) -> None:
    """Else a job that SLURM starts again on other hosts would begin from nothing, without a word."""
    found = run_ranks(resume_where_rank_zero_was_not, 2, str(tmp_path), [0, 120])
    assert all("it has a checkpoint of step 120, but on " in text and "none; copy the folder" in text for text in found)
