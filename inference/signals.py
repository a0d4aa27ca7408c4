"""What SIGTERM and Ctrl-C do to a run: what is being written becomes whole, within ten seconds."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from inference.files import discard_unfinished

GRACE_SECONDS = 8.0
"""After SIGTERM, for the case that is being predicted; then it is given up."""

LAST_SECONDS = 9.5
"""After SIGTERM the process ends, whatever is still being written: `docker stop` waits for 10."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def signals_raise(finish: Callable[[BaseException], bool] | None = None) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into `Stopped`; what is ignored stays so.

    Ctrl-C is raised at once, and so is a second signal.

    Args:
        finish: called at SIGTERM with the error to raise when the case under way is written, and
            says whether there is one; that has `GRACE_SECONDS`, and at `LAST_SECONDS` the process
            ends with whatever is being written. None: SIGTERM is raised at once, and whoever
            catches it may take its time.
    """
    asked_at = 0.0
    given_up = False

    def stop(number: int, _frame: object) -> None:
        nonlocal asked_at, given_up
        error = Stopped(number)
        if number == signal.SIGTERM and finish and not asked_at:
            asked_at = time.monotonic()
            waits = finish(error)
            first = GRACE_SECONDS if waits else LAST_SECONDS
            signal.setitimer(signal.ITIMER_REAL, first, max(0.01, LAST_SECONDS - GRACE_SECONDS))
            if waits:
                return
        given_up = True
        raise error

    def out_of_time(_number: int, _frame: object) -> None:
        nonlocal given_up
        error = Stopped(signal.SIGTERM)
        if not given_up and finish(error):  # it is still being predicted
            given_up = True
            raise error
        if time.monotonic() - asked_at >= LAST_SECONDS:
            discard_unfinished()
            os._exit(128 + signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before_alarm = signal.signal(signal.SIGALRM, out_of_time)
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before_alarm)
        for number, handler in before.items():
            signal.signal(number, handler)
