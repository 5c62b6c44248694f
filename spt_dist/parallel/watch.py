"""Ending the whole run soon after one rank fails, is gone or hangs, with one line that says which and where.

Collectives don't: a rank that waits for one that is gone hears "connection closed" at best, and nothing for half an
hour at worst. So each rank has a thread that leaves a sign of life on the store every second or so. Rank 0's
reads all of them, those of the others rank 0's. Whoever finds something wrong proposes a verdict; the first one
stands, its author tells the user, and every rank ends.
"""

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import torch.distributed as dist

from spt_dist.exits import RunEnded
from spt_dist.parallel.beats import Beat, Kind, State, Verdict, has_ended, waits_for_others
from spt_dist.parallel.faults import is_lost_peer, is_mistake, is_out_of_memory, memory_advice
from spt_dist.parallel.judge import Judge
from spt_dist.parallel.signals import Stopped
from spt_dist.parallel.store import Address, Board

logger = logging.getLogger(__name__)

# Seconds between two looks at the others, and between two at what this rank has to tell.
LONGEST_PAUSE = 1.0
SHORTEST_PAUSE = 0.1
TICK = 0.2
# Beats that have to be missing before a rank is taken for dead, once something is known to be wrong.
MISSING_BEATS = 3
# How long a rank that has something to say is given before the others end, and the launcher with them ends it.
LAST_WORDS = {Kind.FAILED: 5.0, Kind.MEMORY: 5.0, Kind.STOPPED: 5.0, Kind.MISTAKE: 10.0}
SHORTEST_LAST_WORDS = 0.5
# How long a rank stays that ends because of another, so that launchers find the other one first: they look for ended
# processes up to once a second, and name the first.
SECONDS_FOR_FIRST = 3.0
SECONDS_TO_SETTLE = 5.0
SECONDS_TO_TELL = 2.0
# How long a store that ends with its rank is kept for those who have not read the verdict: they look once a second.
SECONDS_TO_HEAR = 6.0


class Watch:
    """Watches over a run from each of its ranks; a context manager around what is watched.

    An exception that leaves the block becomes what ``fail`` makes of it.

    Args:
        board: where the ranks leave signs of life.
        beat: this rank's first.
        world_size: number of ranks.
        timeout: seconds without progress, or without a sign of life from a rank, after which the run is ended.
        address: of the store.
        first_on_host: whether this rank speaks for its host where the ranks can't agree on one to speak for all.
    """

    def __init__(
        self, board: Board, beat: Beat, world_size: int, timeout: float, address: Address, first_on_host: bool
    ) -> None:
        self.rank, self.world_size, self.timeout = beat.rank, world_size, timeout
        self._board, self._address = board, address
        self._hosts_store = beat.rank == 0 and not address.of_launcher
        self._speaks = first_on_host or beat.rank == 1
        self._pause = min(max(timeout / 20, SHORTEST_PAUSE), LONGEST_PAUSE)
        self._patience = MISSING_BEATS * self._pause
        self._judge = Judge(beat.rank, world_size, timeout, self._patience)
        self._beat = beat
        self._place = self._told_place = (beat.count, beat.step, beat.phase, beat.limited)
        self._state = State.RUNNING
        self._known: dict[int, Beat] = {}
        self._main = threading.main_thread().ident
        self._clock, self._looked = 0.0, time.monotonic()
        self._unheard = 0.0
        self._cycles = 0
        self._alert = self._failing = self._told = self._over = False
        self._proposal: Verdict | None = None
        self.verdict: Verdict | None = None
        self._decided, self._wake, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._talk, self._guard)]

    def report(self, step: int, phase: str, limited: bool = True) -> None:
        """Say where this rank is. Costs next to nothing; every rank should make the same calls.

        Args:
            step: steps done so far.
            phase: what it does next, as "training step".
            limited: whether that ends within the timeout. The run counts as hung when no rank has reported for so long
                and one of them is in a limited phase.
        """
        self._place = (self._place[0] + 1, step, phase, limited)

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A run that stopped after a checkpoint did so on all ranks.
        if error is None or isinstance(error, SystemExit) or (isinstance(error, Stopped) and error.step is not None):
            self._leave()
            return
        end = self.fail(error)
        self._end_threads()
        if end is not error:
            raise end from error

    def fail(self, error: BaseException) -> BaseException:
        """Tell the other ranks that this one ends by an error, unless another rank's end is behind it.

        They end promptly, naming this rank and the error.

        Returns:
            What this rank should end with: the error itself if the user can mend it, else a :class:`RunEnded`.
        """
        self._failing = True
        lost_peer = is_lost_peer(error)
        if lost_peer or isinstance(error, Stopped):
            # The launcher stops all ranks when one has ended: look for it. A dead process is seen in the second look.
            if lost_peer:
                time.sleep(TICK)  # a process that is killed loses its connections one by one
            self._alert = True
            looked = self._cycles + 3
            limit = 2 * self._patience + 1 if lost_peer else SECONDS_TO_SETTLE
            self._wait_for(lambda: not lost_peer and self._cycles >= looked, limit)
        if self.verdict is None:
            self._proposal = self._verdict_on(error)
            self._wait_for(lambda: False, SECONDS_TO_SETTLE)
        # The store does not answer any more: then everybody tells what he knows.
        verdict = self.verdict or self._proposal
        assert verdict is not None
        self._hold_store(max(SECONDS_TO_TELL, min(SECONDS_TO_HEAR, _others_stay(verdict) - 1)))
        with self._lock:
            # The first rank tells of another's mistake, since that one gives it time to find the same.
            tells = not self._told and self.rank == (0 if verdict.kind is Kind.MISTAKE else verdict.author)
            self._told = True
        if is_mistake(error):
            return error
        if not tells or verdict.kind is Kind.LOST:
            time.sleep(SECONDS_FOR_FIRST)
        own_fault = verdict.kind is Kind.FAILED and verdict.author == self.rank
        return RunEnded(verdict.text, verdict.status(self.rank), tells, traceback=own_fault)

    def _hold_store(self, seconds: float) -> None:
        """Keep the store until the others have read the verdict, where it ends with this process."""
        if self._hosts_store:
            self._alert = True
            self._wait_for(self._others_heard, seconds, even_if_decided=True)

    def _verdict_on(self, error: BaseException) -> Verdict:
        """What this rank's own error means for the run."""
        beat = self._current()
        if is_mistake(error):
            return Verdict(Kind.MISTAKE, self.rank, f"rank {self.rank}: {error}")
        if isinstance(error, Stopped | KeyboardInterrupt):
            what = str(error) if isinstance(error, Stopped) else "stopped by SIGINT"
            text = f"{what}: {beat.who} at {beat.where}; nothing was saved since the last checkpoint: start again"
            return Verdict(Kind.STOPPED, self.rank, text)
        if is_out_of_memory(error):
            return Verdict(
                Kind.MEMORY, self.rank, f"{beat.who} ran out of memory at {beat.where}: {memory_advice(error)}"
            )
        what = "lost another rank, none of which says why," if is_lost_peer(error) else "failed"
        first = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]
        return Verdict(Kind.FAILED, self.rank, f"{beat.who} {what} at {beat.where}: {first}")

    def _leave(self) -> None:
        """Say goodbye. Rank 0 stays until all have done so: it watches over the others, and may hold the store."""
        self._state = State.DONE
        if self.rank == 0:
            while not self._others_know():
                self._wait_for(self._others_know, self.timeout, even_if_decided=True)
        else:
            self._wait_for(lambda: self._beat.state is not State.RUNNING, SECONDS_TO_SETTLE)
        while self.verdict is not None:
            time.sleep(SHORTEST_PAUSE)  # a thread is about to end the process
        self._end_threads()

    def _end_threads(self) -> None:
        self._over = True
        self._wake.set()
        self._stop.set()
        for thread in self._threads:
            thread.join(SECONDS_TO_TELL)

    def _others_know(self) -> bool:
        others = [beat for rank, beat in self._known.items() if rank != self.rank]
        return len(others) == self.world_size - 1 and all(beat.state is not State.RUNNING for beat in others)

    def _others_heard(self) -> bool:
        """As above, but for those that can't hear any more."""
        others = [beat for rank, beat in self._known.items() if rank != self.rank]
        return len(others) == self.world_size - 1 and all(
            beat.state is not State.RUNNING or has_ended(beat, self._beat) for beat in others
        )

    def _wait_for(self, condition: Callable[[], bool], seconds: float, even_if_decided: bool = False) -> None:
        """Let the thread go round at once, and wait until something is true or decided, or the time is over.

        Time in which this process is stopped does not count: the thread has not gone round in it.
        """
        self._wake.set()
        pause = SHORTEST_PAUSE / 2
        for _ in range(round(seconds / pause)):
            if condition() or (self._decided.is_set() and not even_if_decided):
                return
            time.sleep(pause)

    def _current(self) -> Beat:
        count, step, phase, limited = self._place
        waiting = self._main is not None and waits_for_others(self._main)
        return replace(
            self._beat, count=count, step=step, phase=phase, limited=limited, waiting=waiting, state=self._state
        )

    # What follows runs in the threads.

    def _talk(self) -> None:
        due = 0.0
        while not self._over:
            hurry = self._alert or self._proposal is not None or self._state is not State.RUNNING
            try:
                self._board.check_connection()
                if hurry or time.monotonic() >= due:
                    self._go_round()
                    due = time.monotonic() + self._pause
                elif self._place != self._told_place:
                    self._give_sign()
            except dist.DistError as error:
                logger.debug("the store does not answer: %s", error)
                # If this process was stopped for long, it is the one that the others have named.
                self._lose_store(tells=self._speaks and time.monotonic() - self._looked < self.timeout)
                return
            if self.rank and self._beat.state is not State.RUNNING:
                return  # rank 0 may take the store with it from here on
            self._wake.wait(TICK)
            self._wake.clear()

    def _guard(self) -> None:
        """Notice that the other thread waits for the store for ever, as it does when a network is cut."""
        while not self._stop.wait(self._pause):
            self._unheard += self._pause
            if self._unheard > self.timeout + self._patience:
                self._lose_store(self._speaks)
                return

    def _give_sign(self) -> None:
        self._told_place = self._place
        self._beat = replace(self._current(), number=self._beat.number + 1)
        self._board.publish(self._beat)

    def _go_round(self) -> None:
        """Give a sign of life, look at those of the others, decide."""
        self._give_sign()
        if self.rank and self._beat.state is not State.RUNNING:
            self._cycles += 1
            return
        everybody = self.rank == 0 or self._alert
        ended = [rank for rank, beat in self._known.items() if has_ended(beat, self._beat)]
        beats, verdict = self._board.read([*range(self.world_size)] if everybody else [0])
        self._known |= beats
        # A process that was stopped for a while must not take the others for silent.
        now = time.monotonic()
        self._clock += min(now - self._looked, 2 * self._pause)
        self._looked, self._unheard = now, 0.0
        if verdict is None:
            found = self._proposal or self._judge.look(beats, ended, self._clock, self._alert)
            verdict = found and self._board.settle(found)
        self._cycles += 1
        if verdict is not None and self.verdict is None:
            self._decide(verdict)

    def _lose_store(self, tells: bool) -> None:
        # At the end it goes with whoever ends last.
        if self.verdict is None and not (self._over or self._state is State.DONE):
            self._decide(self._judge.store_lost(self._known.get(0), self._address, tells))

    def _decide(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self._state = State.ENDING
        self._decided.set()
        self._wake.set()
        if not self._failing:
            threading.Thread(target=self._end_process, args=(verdict,), daemon=True).start()

    def _end_process(self, verdict: Verdict) -> None:
        """End this process from a thread: the main one may wait in C++ for a rank that does not answer."""
        if verdict.author != self.rank:
            time.sleep(LAST_WORDS.get(verdict.kind, SHORTEST_LAST_WORDS))
        status = verdict.status(self.rank)
        # A pipe that nobody reads must not keep the process.
        limit = threading.Timer(2 * SECONDS_TO_TELL + SECONDS_TO_HEAR + SECONDS_FOR_FIRST, os._exit, (status,))
        limit.daemon = True
        limit.start()
        with self._lock:
            tells = self.rank == (0 if verdict.kind is Kind.MISTAKE else verdict.author)
            if tells and not self._told:
                os.write(2, f"error: {verdict.text}\n".encode())
            self._told = True
        if self.rank in verdict.culprits and self._main is not None:
            stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
            os.write(2, f"rank {self.rank} is at:\n{stack}".encode())
        logger.info("ended with status %d: %s", status, verdict.text)
        sys.stdout.flush()
        if verdict.kind is Kind.LOST:
            # Who is lost does not hear it; for the others the store is there until this process ends.
            self._hold_store(SECONDS_TO_TELL)
            time.sleep(SECONDS_FOR_FIRST)
        else:
            self._hold_store(SECONDS_TO_HEAR)
        os._exit(status)


def _others_stay(verdict: Verdict) -> float:
    """Seconds that ranks stay who have read a verdict: what its author says later comes after the launcher's word."""
    return LAST_WORDS.get(verdict.kind, SHORTEST_LAST_WORDS) + (SECONDS_FOR_FIRST if verdict.kind is Kind.LOST else 0)
