"""Ctrl-C, SIGTERM and a closed terminal, raised in a command or held while a process starts."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from inference.signals import Stopped

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Raise `Stopped` at Ctrl-C, SIGTERM and a closed terminal; what is ignored stays so."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    with _handled(stop):
        yield


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let the signals take effect only at the end of the block."""
    held: list[int] = []
    try:
        with _handled(lambda number, _: held.append(number)):
            yield
    finally:
        if held:
            signal.raise_signal(held[0])


@contextmanager
def _handled(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Handle the signals in another way for a while, but those that are ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {n: handler for n, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
