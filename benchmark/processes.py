"""Functions called in processes of their own: one that dies or never returns costs its own call."""

import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Generator, Hashable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


class WorkerDiedError(RuntimeError):
    """The process of a call was ended before it gave a result, as where memory runs out."""


def in_processes(
    function: Callable[..., Any],
    jobs: Mapping[Key, tuple],
    workers: int,
    *,
    start: str = "fork",
    memory: int | None = None,
    seconds: float | None = None,
) -> Generator[tuple[Key, Any], None, None]:
    """Call a function for every job, some at once, and yield the results as they come.

    Args:
        function: what to call.
        jobs: each job's key and arguments.
        workers: processes at once.
        start: "fork", or "forkserver" where a fork would take the locks of other threads with it.
        memory: bytes of data that a process may take.
        seconds: without a result for so long, what runs is ended.

    Yields:
        The key, and what the function returned, or the exception that it raised, a TimeoutError or
        a WorkerDiedError. When the caller stops asking, by an exception too, no process is left.
    """
    context: Any = multiprocessing.get_context(start)
    waiting = iter(jobs.items())
    running: dict[Connection, tuple[Key, multiprocessing.Process]] = {}
    deadline = time.monotonic() + (seconds or math.inf)
    try:
        while True:
            while len(running) < workers and (job := next(waiting, None)):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (sender, function, job[1], memory)
                process = context.Process(target=_answer, args=arguments, daemon=True)
                running[receiver] = (job[0], process)
                process.start()
                sender.close()
            if not running:
                return
            # Not for ever: a signal that comes just before the wait does not end it.
            finished = wait(list(running), 1.0)
            ready = [receiver for receiver in running if receiver in finished]
            if ready:
                deadline = time.monotonic() + (seconds or math.inf)
            elif time.monotonic() < deadline:
                continue
            for receiver in ready or list(running):
                key, process = running[receiver]
                try:
                    result = (
                        receiver.recv() if ready else TimeoutError(f"more than {seconds:.0f} s")
                    )
                except EOFError:
                    process.join()
                    result = WorkerDiedError(f"its process ended with {process.exitcode}")
                del running[receiver]
                _end(process)
                receiver.close()
                yield key, result
    finally:
        for _, process in running.values():
            _end(process)


def _end(process: multiprocessing.Process) -> None:
    if process.pid is not None:
        process.kill()
        process.join()


def _answer(sender: Connection, function: Callable, arguments: tuple, memory: int | None) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # they are for the caller, which ends this
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    sender.send(result)
