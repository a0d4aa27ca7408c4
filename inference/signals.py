"""What SIGTERM, SIGHUP and Ctrl-C do: what is being written becomes whole, within ten seconds."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from .files import discard_unfinished

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; `docker stop`, a scheduler; a terminal or connection that is lost."""

GRACE_SECONDS = 8.0
"""After SIGTERM or SIGHUP, for the case that is being predicted; then it is given up."""

LAST_SECONDS = 9.5
"""After them the process ends, whatever is still being written: `docker stop` waits for 10."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def handling_stop_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call a handler at any of `STOP_SIGNALS`; those that are ignored (nohup) stay so."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: known for number, known in before.items() if known != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


@contextlib.contextmanager
def signals_raise(finish: Callable[[BaseException], bool] | None = None) -> Iterator[None]:
    """Turn `STOP_SIGNALS` into `Stopped`; those that are ignored stay so.

    Ctrl-C is raised at once, and so is a second signal.

    Args:
        finish: called at SIGTERM or SIGHUP with the error to raise when the case under way is
            written; returns whether there is one. That has `GRACE_SECONDS`, and at `LAST_SECONDS`
            the process ends with whatever is being written. None: every signal is raised at once,
            and whoever catches it may take its time.
    """
    was_asked = was_raised = False

    def stop(number: int, _frame: object) -> None:
        nonlocal was_asked, was_raised
        error, waits = Stopped(number), False
        if number != signal.SIGINT and finish and not was_asked:
            was_asked, waits, end = True, finish(error), time.monotonic() + LAST_SECONDS

            def out_of_time(*_: object) -> None:
                nonlocal was_raised
                if not was_raised and finish(error):  # it is still being predicted
                    was_raised = True
                    raise error
                if time.monotonic() >= end:
                    discard_unfinished()
                    os._exit(128 + number)

            signal.signal(signal.SIGALRM, out_of_time)
            first = GRACE_SECONDS if waits else LAST_SECONDS
            signal.setitimer(signal.ITIMER_REAL, first, max(0.01, LAST_SECONDS - GRACE_SECONDS))
        if not waits:
            was_raised = True
            raise error

    before_alarm = signal.getsignal(signal.SIGALRM)
    try:
        with handling_stop_signals(stop):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before_alarm)
