"""Being asked to stop, within one process."""

import os
import signal
from collections.abc import Iterator

import pytest

from spt_dist.parallel.signals import SIGNALS, Stopped, StopSignals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_once_where_nothing_can_be_saved(number: signal.Signals) -> None:
    with pytest.raises(Stopped, match=rf"^stopped by {number.name}$") as caught, StopSignals():
        send(number)
        pytest.fail("went on")
    assert caught.value.step is None


def test_a_signal_is_only_noted_while_deferred() -> None:
    with pytest.raises(Stopped) as caught, StopSignals() as stop:
        assert not stop.requested
        with stop.deferred():
            send(signal.SIGUSR1)
            assert stop.requested
            raise stop.stopped(7)
    assert str(caught.value) == "stopped by SIGUSR1 at step 7; checkpoint saved: go on with --resume"
    assert caught.value.step == 7


def test_the_second_signal_does_not_disturb_what_the_first_one_began() -> None:
    saved = []
    with pytest.raises(Stopped, match="SIGUSR1"), StopSignals() as stop:
        try:
            send(signal.SIGUSR1)
        finally:
            send(signal.SIGTERM)
            send(signal.SIGUSR1)
            saved.append(stop.requested)
    assert saved == [True]


def test_a_noted_signal_that_nobody_acted_on_stops_at_the_end_of_the_deferral() -> None:
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM$"), StopSignals() as stop:
        with stop.deferred():
            send(signal.SIGTERM)
        pytest.fail("went on")


def test_an_error_while_deferred_is_not_hidden_by_a_signal() -> None:
    with pytest.raises(KeyError), StopSignals() as stop, stop.deferred():
        send(signal.SIGTERM)
        raise KeyError


def test_a_rank_that_got_no_signal_stops_with_the_others() -> None:
    assert str(StopSignals().stopped(3)).startswith("stopped by a signal to another rank at step 3; checkpoint saved")


def test_stopped_is_no_exception_that_a_broad_handler_takes() -> None:
    assert not issubclass(Stopped, Exception)


def test_ignored_signals_stay_ignored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as stop:
        stop.ignore()
        send(signal.SIGTERM)
    send(signal.SIGUSR1)
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 2
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
