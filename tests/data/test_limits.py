"""What a chat template may take: the limits reach it wherever it is, and end with it."""

import signal
import sys
import time

import pytest

from truetune.data import limits
from truetune.data.limits import OutOfTime, limited


def work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(10_000))  # because the limit is one of user time, and asking for the time is the kernel's


class SlowToGo:
    """Its destructor is still at work when the time is over."""

    def __del__(self):
        work(2 * limits.SECONDS)


class FailsToGo:
    def __del__(self):
        raise ValueError


class OutOfMemoryToGo:
    def __del__(self):
        raise MemoryError


@pytest.fixture
def reported(monkeypatch):
    """The types of what was raised inside destructors and reported."""
    types: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: types.append(unraisable.exc_type))
    return types


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.1)


def test_time_that_runs_out_in_a_destructor_is_raised_behind_it_and_not_reported(reported):
    with pytest.raises(OutOfTime), limited():
        SlowToGo()
        work(5)
    assert not reported


def test_only_the_limits_own_errors_go_unreported(reported):
    with limited():
        OutOfMemoryToGo()
        FailsToGo()
    assert reported == [ValueError]
    OutOfMemoryToGo()
    assert reported == [ValueError, MemoryError]


def test_the_limits_end_with_what_they_are_for(reported):
    before = signal.getsignal(signal.SIGVTALRM), sys.unraisablehook
    with limited():
        pass
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert (signal.getsignal(signal.SIGVTALRM), sys.unraisablehook) == before
