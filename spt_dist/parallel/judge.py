"""Telling from the ranks' signs of life which of them is gone or hung."""

from collections.abc import Iterable, Mapping

from spt_dist.parallel.beats import NOBODY, Beat, Kind, State, Verdict
from spt_dist.parallel.store import Address

MOST_NAMED = 8
GONE = "killed, perhaps for want of memory, or crashed"


class Judge:
    """Follows the beats of some ranks.

    Args:
        rank: the rank that looks.
        world_size: number of ranks. Only who looks at all of them can tell that the run hangs.
        timeout: seconds without progress of any rank, or without a beat of one, after which something is wrong.
        patience: seconds without a beat after which a rank is at fault, if something is known to be wrong.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, patience: float) -> None:
        self.rank, self.world_size, self.timeout, self.patience = rank, world_size, timeout, patience
        self._heard: dict[int, tuple[int, float]] = {}
        self._progress: tuple[object, float] = (None, 0.0)

    def look(self, beats: Mapping[int, Beat], ended: Iterable[int], now: float, alert: bool) -> Verdict | None:
        """Find what is wrong, if anything.

        Args:
            beats: the latest beat of each rank that is looked at.
            ended: ranks whose processes were known to have ended before the beats were read.
            now: seconds by a clock that stands still while the looking process is stopped.
            alert: whether something is known to be wrong.
        """
        running = {rank: beat for rank, beat in beats.items() if beat.state is State.RUNNING}
        for rank, beat in beats.items():
            if rank not in self._heard or self._heard[rank][0] != beat.number:
                self._heard[rank] = (beat.number, now)
        for rank in ended:
            # It would have said goodbye, and the beat was read after its end.
            if rank in running:
                return self._lost(running[rank], "is gone", GONE)
        quiet = {rank: now - self._heard[rank][1] for rank in running if rank != self.rank}
        longest = max(quiet, key=quiet.__getitem__, default=None)
        hung = self._no_progress(beats, now) and any(beat.limited for beat in running.values())
        if longest is not None and quiet[longest] > (self.patience if alert or hung else self.timeout):
            return self._lost(
                running[longest],
                f"has given no sign of life for {quiet[longest]:.0f} s",
                "killed or stopped, or its host can't be reached",
            )
        return self._hung(running) if hung else None

    def _no_progress(self, beats: Mapping[int, Beat], now: float) -> bool:
        if len(beats) < self.world_size:
            return False
        places = {rank: (beat.count, beat.state) for rank, beat in beats.items()}
        if places != self._progress[0]:
            self._progress = (places, now)
        return now - self._progress[1] > self.timeout

    def store_lost(self, first: Beat | None, address: Address, tells: bool) -> Verdict:
        """What the end of the connection to the store means.

        Args:
            first: rank 0's last beat, if any was read.
            address: where the store is.
            tells: whether this rank is to tell the user, for the ranks can't agree on one any more.
        """
        if address.of_launcher:
            text = f"the launcher's process at {address} is gone or can't be reached"
        elif first is None:
            text = f"rank 0, at {address}, is gone or can't be reached"
        else:
            text = self._lost(first, "is gone or can't be reached", GONE).text
        return Verdict(Kind.LOST, self.rank if tells else NOBODY, text)

    def _lost(self, beat: Beat, what: str, why: str) -> Verdict:
        return Verdict(Kind.LOST, self.rank, f"{beat.who} {what} ({why}); it was last seen at {beat.where}")

    def _hung(self, running: Mapping[int, Beat]) -> Verdict:
        """Those behind the others that don't wait for anybody; everybody where all wait."""
        busy = [beat for beat in running.values() if not beat.waiting]
        behind = [beat for beat in busy if beat.count == min(other.count for other in busy)]
        named = behind or list(running.values())
        places = [f"{beat.who} is at {beat.where}" for beat in named[:MOST_NAMED]]
        more = f", and {len(named) - MOST_NAMED} more ranks" if len(named) > MOST_NAMED else ""
        cause = "no progress" if behind else "all ranks wait for each other, no progress"
        text = f"{cause} for {self.timeout:.0f} s: {', '.join(places)}{more}"
        return Verdict(Kind.HUNG, self.rank, text, tuple(beat.rank for beat in behind))
