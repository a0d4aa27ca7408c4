"""Cases scored at once, each in a process of its own: one that dies costs its case and no other."""

import multiprocessing
from collections.abc import Callable, Hashable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any


class WorkerDiedError(RuntimeError):
    """The process of a case was ended before it gave a result, as where memory runs out."""


def in_processes(
    function: Callable[..., Any], jobs: Mapping[Hashable, tuple], workers: int
) -> Iterator[tuple[Hashable, Any]]:
    """Call a function for every job, some at once, and give the results as they come.

    Args:
        function: what to call; it and its arguments are there in a forked process.
        jobs: each job's key and arguments.
        workers: processes at once.

    Yields:
        The key, and what the function returned, or the exception that it raised, or a
        `WorkerDiedError`. When the caller stops asking, by an exception too, no process is left.
    """
    context = multiprocessing.get_context("fork")
    waiting = iter(jobs.items())
    running: dict[Connection, tuple[Hashable, multiprocessing.Process]] = {}
    try:
        while True:
            while len(running) < workers and (job := next(waiting, None)):
                key, arguments = job
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_answer, args=(sender, function, arguments), daemon=True
                )
                running[receiver] = (key, process)
                process.start()
                sender.close()
            if not running:
                return
            for receiver in wait(list(running)):
                key, process = running.pop(receiver)
                try:
                    result = receiver.recv()
                except EOFError:
                    process.join()
                    result = WorkerDiedError(f"its process ended with {process.exitcode}")
                receiver.close()
                process.join()
                yield key, result
    finally:
        for _, process in running.values():
            if process.pid is not None:
                process.kill()
                process.join()


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    sender.send(result)
