"""Who is found at fault, from signs of life made by hand."""

from dataclasses import replace
from typing import Any

from spt_dist.parallel.beats import Beat, Kind, State, Verdict, first_beat, has_ended
from spt_dist.parallel.judge import Judge
from spt_dist.parallel.store import Address

TIMEOUT, PATIENCE = 10.0, 1.0


def beat(rank: int, number: int = 0, **changes: Any) -> Beat:
    made = Beat(rank, number, 5, 12, "training step", True, False, State.RUNNING, f"n{rank}", 100 + rank, "m", 7)
    return replace(made, **changes)


class Run:
    """Three ranks that beat every second and wait for each other, but for what a test changes."""

    def __init__(self) -> None:
        self.judge = Judge(0, 3, TIMEOUT, PATIENCE)
        self.now = 0

    def go(self, seconds: int, alert: bool = False, **changes: dict[str, Any]) -> Verdict | None:
        """Let time pass, until a verdict; ``rankN`` changes its beats."""
        for _ in range(seconds):
            self.now += 1
            beats = {
                rank: beat(rank, **{"number": self.now, "waiting": True} | changes.get(f"rank{rank}", {}))
                for rank in range(3)
            }
            found = self.judge.look(beats, [], self.now, alert)
            if found is not None:
                return found
        return None


def test_no_progress_within_the_timeout_is_fine() -> None:
    assert Run().go(11) is None


def test_the_rank_that_does_not_wait_is_hung() -> None:
    run = Run()
    found = run.go(30, rank1={"waiting": False, "phase": "loading data"})
    assert found == Verdict(
        Kind.HUNG, 0, "no progress for 10 s: rank 1 (host n1, pid 101) is at step 12, loading data", (1,)
    )
    assert run.now == 12


def test_of_several_that_do_not_wait_the_one_behind_is_hung() -> None:
    found = Run().go(30, rank1={"waiting": False}, rank2={"waiting": False, "count": 4})
    assert found is not None and found.culprits == (2,)


def test_ranks_that_all_wait_are_all_named() -> None:
    found = Run().go(30)
    assert found is not None and found.text.startswith("all ranks wait for each other, no progress for 10 s: ")
    assert all(f"rank {rank} (host n{rank}" in found.text for rank in range(3)) and found.culprits == ()


def test_progress_of_any_rank_keeps_the_run() -> None:
    run = Run()
    assert all(run.go(5, rank2={"count": count}) is None for count in range(20))


def test_a_phase_without_limit_may_last() -> None:
    free = {"limited": False}
    assert Run().go(100, rank0=free, rank1=free, rank2=free) is None
    assert Run().go(100, rank0=free, rank1=free) is not None


def test_a_silent_rank_is_lost_after_the_timeout() -> None:
    run = Run()
    run.go(1)
    # The others go on.
    found = next(filter(None, (run.go(1, rank0={"count": n}, rank2={"number": 1}) for n in range(30))))
    assert found.kind is Kind.LOST
    assert found.text.startswith("rank 2 (host n2, pid 102) has given no sign of life for 11 s")
    assert found.text.endswith("it was last seen at step 12, training step")
    assert run.now == 12


def test_a_silent_rank_is_to_blame_for_a_hang() -> None:
    run = Run()
    run.go(5)
    found = run.go(30, rank1={"number": 5, "waiting": True}, rank0={"waiting": False})
    assert found is not None and found.kind is Kind.LOST and "rank 1" in found.text
    assert run.now == 12


def test_a_silent_rank_is_lost_soon_when_something_is_wrong() -> None:
    run = Run()
    run.go(1)
    assert run.go(1, alert=True, rank1={"number": 1}) is None
    found = run.go(1, alert=True, rank1={"number": 1})
    assert found is not None and "rank 1" in found.text


def test_ranks_that_are_done_are_not_missed() -> None:
    gone = {"state": State.DONE, "number": 1}
    assert Run().go(9, rank1=gone, rank2=gone, rank0={"limited": False}) is None
    run = Run()
    assert run.judge.look({0: beat(0), 1: beat(1, state=State.DONE), 2: beat(2)}, [1], 0.0, False) is None
    assert run.go(30, alert=True, rank1=gone, rank2=gone, rank0={"limited": False}) is None


def test_an_ended_process_is_gone_at_once() -> None:
    found = Run().judge.look({0: beat(0), 1: beat(1), 2: beat(2)}, [2], 0.0, False)
    assert found is not None and found.text.startswith("rank 2 (host n2, pid 102) is gone (")


def test_who_looks_at_some_ranks_only_can_not_tell_that_the_run_hangs() -> None:
    judge = Judge(1, 3, TIMEOUT, PATIENCE)
    assert all(judge.look({0: beat(0, now)}, [], now, False) is None for now in range(100))
    found = [judge.look({0: beat(0, 99)}, [], now, False) for now in range(100, 120)]
    assert [verdict is not None for verdict in found] == [False] * 10 + [True] * 10


def test_the_end_of_the_store_is_that_of_who_held_it() -> None:
    judge = Judge(1, 3, TIMEOUT, PATIENCE)
    of_rank, of_launcher = Address("node", 5, False), Address("node", 5, True)
    assert judge.store_lost(beat(0), of_rank, True).text.startswith("rank 0 (host n0, pid 100) is gone")
    assert judge.store_lost(None, of_rank, True).text.startswith("rank 0, at node:5, is gone")
    assert judge.store_lost(beat(0), of_launcher, True).text.startswith("the launcher's process at node:5 is gone")
    assert (judge.store_lost(beat(0), of_rank, True).author, judge.store_lost(beat(0), of_rank, False).author) == (
        1,
        -1,
    )


def test_many_ranks_are_counted_and_not_all_named() -> None:
    judge = Judge(0, 100, 1.0, 1.0)
    for now in range(3):
        found = judge.look({rank: beat(rank, now) for rank in range(100)}, [], now, False)
    assert found is not None
    assert found.text.count("host") == 8 and found.text.endswith("and 92 more ranks")


def test_a_process_is_known_by_pid_machine_and_birth() -> None:
    mine = first_beat(0)
    assert not has_ended(mine, mine)
    assert has_ended(replace(mine, born=mine.born + 1), mine)
    assert has_ended(replace(mine, pid=2**22 + 1), mine)
    assert not has_ended(replace(mine, pid=2**22 + 1, machine="another"), mine)


def test_beats_and_verdicts_pass_through_the_store_unchanged() -> None:
    verdict = Verdict(Kind.HUNG, 3, "text", (1, 2))
    assert Beat.from_json(beat(1, state=State.DONE).to_json()) == beat(1, state=State.DONE)
    assert Verdict.from_json(verdict.to_json()) == verdict
