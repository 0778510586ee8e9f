"""The time and memory that a chat template may use: templates come from anywhere, and Jinja's sandbox bounds neither.

It stops a `range` over 100,000, but not two of them in each other, `10 ** 10 ** 9` or a string that doubles itself.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

SECONDS = 20.0  # of this process's CPU time, for a few conversations, which take milliseconds
GIBIBYTES = 4.0


class OutOfTime(BaseException):
    """No `Exception`, so that nothing on its way out, Jinja's optimizer for one, takes it for a failure of its own."""


@contextmanager
def limited() -> Iterator[None]:
    """Raises `OutOfTime` or `MemoryError` where what is inside takes more than `SECONDS` or `GIBIBYTES`.

    Python has signals in the main thread alone and Linux alone bounds a process's memory; elsewhere it does nothing.
    """
    with _nothing_said_of_destructors(), _limited_memory(), _limited_time():
        yield


@contextmanager
def _nothing_said_of_destructors() -> Iterator[None]:
    """Python can only report what is raised inside a destructor, as an ignored traceback on stderr. The limits' own
    errors are not worth one: time that has run out is raised again, and memory that is short will be so again."""
    before = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, OutOfTime | MemoryError):
            before(unraisable)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> NoReturn:
        raise OutOfTime

    # CPU time, because a laptop may sleep; and SIGALRM is pytest's and others'. Again and again, because what is
    # raised inside a destructor is lost.
    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 0.1)
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:  # once more, because the signal may have come in the line above
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _limited_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    limit = in_use + int(GIBIBYTES * 2**30)
    if soft == resource.RLIM_INFINITY or limit < soft:
        with suppress(ValueError, OSError):  # above a hard limit, which then is the limit
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
