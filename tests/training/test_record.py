"""Putting an earlier run aside."""

from pathlib import Path

import pytest

from spt_dist.training.record import ARTEFACTS, put_aside
from tests.ranks import run_ranks


def aside(folder: str) -> None:
    """``put_aside`` on a rank."""
    put_aside(Path(folder))


@pytest.mark.distributed
def test_an_earlier_run_is_moved_whole_and_the_one_before_it_goes(tmp_path: Path) -> None:
    for content in ("first", "second"):
        for name in ARTEFACTS:
            if "." in name:
                (tmp_path / name).write_text(content)
            else:
                (tmp_path / name).mkdir()
                (tmp_path / name / "file").write_text(content)
        run_ranks(aside, 2, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["previous"]
    assert sorted(path.name for path in (tmp_path / "previous").iterdir()) == sorted(ARTEFACTS)
    assert (tmp_path / "previous" / "summary.json").read_text() == "second"
    assert (tmp_path / "previous" / "checkpoints" / "file").read_text() == "second"
    run_ranks(aside, 2, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
