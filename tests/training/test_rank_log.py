"""The log file of each rank, beside what the terminal shows."""

import io
import logging
import re
from pathlib import Path

import pytest
import torch.distributed as dist

from spt_dist.training.rank_log import rank_log
from tests.ranks import run_ranks

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+ \S+: .*)")


def log_everything(where: str) -> None:
    """A record of each level, of ours, of another library, and of a talkative one whose name begins like ours."""
    logging.getLogger("spt_distant").setLevel(logging.INFO)
    for name in ("spt_dist.training.trainer", "deepspeed", "spt_distant"):
        logger = logging.getLogger(name)
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logger.log(level, "%s on rank %d", where, dist.get_rank())


def log_on_rank(folder: str) -> tuple[str, int, int]:
    """What the terminal showed, the level of our logger afterwards and the number of handlers."""
    terminal = io.StringIO()
    # As launch/ does it.
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[logging.StreamHandler(terminal)]
    )
    ours = logging.getLogger("spt_dist")
    ours.setLevel(logging.INFO if dist.get_rank() == 0 else logging.WARNING)
    log_everything("before")
    with rank_log(Path(folder), dist.get_rank()):
        log_everything("within")
    log_everything("after")
    return terminal.getvalue(), ours.level, len(logging.getLogger().handlers)


def expected(where: str, rank: int, ours: str, talkative: str) -> list[str]:
    """Records of ours and of the talkative library from these levels on, of the other one from WARNING on."""
    levels = ["INFO", "WARNING", "ERROR"]
    lowest = {"spt_dist.training.trainer": ours, "deepspeed": "WARNING", "spt_distant": talkative}
    return [
        f"{level} {name}: {where} on rank {rank}"
        for name, first in lowest.items()
        for level in levels[levels.index(first) :]
    ]


def lines_of(path: Path) -> list[str]:
    """The lines of a log without their time, which each has to have."""
    matches = [LINE.fullmatch(line) for line in path.read_text().splitlines()]
    return [match[1] if match else "no time" for match in matches]


@pytest.mark.distributed
def test_each_rank_has_its_file_and_terminals_stay_as_they_are(tmp_path: Path) -> None:
    for times in (1, 2):
        results = run_ranks(log_on_rank, 2, str(tmp_path))
        for rank, (terminal, level, handlers) in enumerate(results):
            shown = "WARNING" if rank else "INFO"
            assert terminal.splitlines() == [
                line for where in ("before", "within", "after") for line in expected(where, rank, shown, "INFO")
            ]
            assert (level, handlers) == (logging.WARNING if rank else logging.INFO, 1)
            lines = lines_of(tmp_path / "logs" / f"rank-{rank}.log")
            # A resumed run goes on in the same file.
            length = len(lines) // times
            assert len(lines) == length * times
            for begins in range(0, len(lines), length):
                assert re.fullmatch(r"INFO spt_dist.training.rank_log: process \d+ on \S+ begins", lines[begins])
                records = lines[begins + 1 : begins + length]
                assert records == expected("within", rank, "INFO", "WARNING")


def test_an_exception_goes_to_the_file_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    handlers = list(logging.getLogger().handlers)
    filters = [list(handler.filters) for handler in handlers]
    with pytest.raises(ZeroDivisionError), rank_log(tmp_path, 3):
        1 // 0  # noqa: B018
    text = (tmp_path / "logs" / "rank-3.log").read_text()
    assert "ERROR spt_dist.training.rank_log: ended by an exception\nTraceback" in text
    assert text.endswith("ZeroDivisionError: integer division or modulo by zero\n")
    assert caplog.messages == []
    assert logging.getLogger().handlers == handlers
    assert [handler.filters for handler in handlers] == filters
    assert logging.getLogger("spt_dist").level == logging.NOTSET


def test_a_more_talkative_log_stays_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "spt_dist")
    with rank_log(tmp_path, 0):
        logging.getLogger("spt_dist.data").debug("detail")
    assert caplog.messages == ["detail"]
    assert "detail" not in (tmp_path / "logs" / "rank-0.log").read_text()
