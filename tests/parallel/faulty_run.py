"""A small run in which one rank does what the command line says at one step; started by the tests under launchers.

It stands in for the scripts of ``launch/``: the same ``run`` and ``process_group``, a collective in each step, and a
loop that stops and "saves" as the trainer does.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import torch
import torch.distributed as dist

from _cli import run
from spt_dist import UserError
from spt_dist.parallel.launch import ProcessGroup, process_group

NUM_STEPS = 12
# Where nobody else has to have seen where a rank is, it still has to be in that place for a while.
SECONDS_IN_PLACE = 1.5
LONGEST_WAIT = 200
PHASES = ("loading data", "training step")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="")
    parser.add_argument("--rank", type=int, default=0, help="the rank that is faulty; -1 for all")
    parser.add_argument("--step", type=int, default=3)
    parser.add_argument("--phase", default="training step")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", "--local-rank")
    options = parser.parse_args()
    own_rank = int(os.environ.get("RANK", "0"))
    options.mine = options.rank in (own_rank, -1)
    (options.out / f"pid-{own_rank}").write_text(str(os.getpid()), encoding="utf-8")
    options.group = None
    # The time that they have for joining would begin with the imports of the first.
    ranks = range(int(os.environ.get("WORLD_SIZE", "1")))
    wait_until(lambda: all((options.out / f"pid-{rank}").exists() for rank in ranks))
    maybe_fail(options, 0, "before joining")
    with process_group(options.timeout) as group:
        options.group = group
        threading.Thread(target=note_what_is_seen, args=(options, group), daemon=True).start()
        maybe_fail(options, 0, "starting")
        group.watch.report(0, "scoring")
        maybe_fail(options, 0, "scoring")
        if options.fault == "kill busy":
            time.sleep(20)  # the others hear of it by the launcher's SIGTERM, not by a collective
        dist.barrier()
        with group.stop.deferred():
            loop(options, group)
        group.watch.report(NUM_STEPS, "writing results")
        maybe_fail(options, NUM_STEPS, "writing results")
        note(options, group.rank, f"done {group.world_size} {os.environ.get('TORCHELASTIC_RESTART_COUNT')}")


def loop(options: argparse.Namespace, group: ProcessGroup) -> None:
    """Steps with a collective in each, which all ranks leave together when one was asked to stop."""
    for step in range(NUM_STEPS):
        for phase in PHASES:
            group.watch.report(step, phase)
            maybe_fail(options, step, phase)
            time.sleep(0.05)
        votes = torch.tensor([1.0, float(group.stop.requested)])
        dist.all_reduce(votes)
        assert votes[0] == group.world_size
        if votes[1]:
            group.watch.report(step + 1, "saving a checkpoint")
            maybe_fail(options, step, "saving")
            note(options, group.rank, f"saved {step + 1}")
            raise group.stop.stopped(step + 1)


def note(options: argparse.Namespace, rank: int, text: str) -> None:
    (options.out / f"note-{rank}").write_text(text, encoding="utf-8")


def note_what_is_seen(options: argparse.Namespace, group: ProcessGroup) -> None:
    """Tell the faulty rank, in a file, the latest of its reports that this one has read."""
    if options.rank in (group.rank, -1):
        return
    while True:
        beat = group.watch._known.get(options.rank)
        if beat is not None:
            path = options.out / f"seen-by-{group.rank}"
            path.with_suffix(".new").write_text(str(beat.count), encoding="utf-8")
            path.with_suffix(".new").replace(path)
        time.sleep(0.05)


def is_seen(options: argparse.Namespace) -> bool:
    """Whether those that look at this rank have read where it is: rank 0 looks at all, the others at rank 0."""
    group = options.group
    watchers = range(1, group.world_size) if group.rank == 0 else [0]
    paths = [options.out / f"seen-by-{rank}" for rank in watchers]
    return all(path.exists() and int(path.read_text(encoding="utf-8")) == group.watch._place[0] for path in paths)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_WAIT
    while not condition():
        assert time.monotonic() < deadline, "the other ranks don't come"
        time.sleep(0.02)


def maybe_fail(options: argparse.Namespace, step: int, phase: str) -> None:
    """Do what the test wants of this rank here: "once" over all restarts, or "twice", the second time in saving."""
    name, _, how_often = options.fault.partition(" ")
    here = (step, phase) == (options.step, options.phase) or (phase == "saving" and how_often == "twice")
    happened = options.out / "happened"
    if not (options.fault and options.mine and here) or (how_often == "once" and happened.exists()):
        return
    time.sleep(SECONDS_IN_PLACE)
    if options.group is not None and options.rank >= 0 and phase != "saving":
        wait_until(lambda: is_seen(options))
    happened.write_text(str(time.time()), encoding="utf-8")
    FAULTS[name](options)


def stop(options: argparse.Namespace) -> None:
    """Stop this process, and have a child let it go on after a while."""
    pid = os.getpid()
    if os.fork() == 0:
        os.setsid()
        time.sleep(options.seconds)
        os.kill(pid, signal.SIGCONT)
        os._exit(0)
    os.kill(pid, signal.SIGSTOP)


def spin(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + options.seconds
    while time.monotonic() < deadline:
        pass


def fail(options: argparse.Namespace) -> None:
    if options.fault.endswith(" deaf"):
        # For good: the launcher kills it.
        os.kill(int((options.out / "pid-2").read_text(encoding="utf-8")), signal.SIGSTOP)
    raise RuntimeError("the cat sat on the keyboard")


def mistake(options: argparse.Namespace) -> None:
    raise UserError("task: no such shard; make one")


def exhaust(options: argparse.Namespace) -> None:
    torch.empty(2**60)


def exhaust_python(options: argparse.Namespace) -> None:
    raise MemoryError


def kill_self(number: int, options: argparse.Namespace) -> None:
    os.kill(os.getpid(), number)


FAULTS = {
    "kill": lambda options: kill_self(signal.SIGKILL, options),
    "term": lambda options: kill_self(signal.SIGTERM, options),
    "usr1": lambda options: kill_self(signal.SIGUSR1, options),
    "stop": stop,
    "sleep": lambda options: time.sleep(options.seconds),
    "spin": spin,
    "fail": fail,
    "mistake": mistake,
    "exhaust": exhaust,
    "exhaust_python": exhaust_python,
}


if __name__ == "__main__":
    run(main)
