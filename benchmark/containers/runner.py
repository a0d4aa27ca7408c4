"""One case through a team's container or command: started as the organisers do, ended for certain.

The time is the wall clock around `docker container run`: container start, interpreter start,
imports and CUDA context are in it. However a run ends (by itself, by the time limit, by Ctrl-C),
its container is removed by name and its process group is ended before anything else happens.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmark.containers.collecting import LogWriter
from benchmark.containers.engine import EngineError, container_name, owner_label
from benchmark.containers.orphans import orphans_ended
from benchmark.containers.sampler import Sampler, SamplerCost, Samples
from benchmark.containers.targets import Command, Container, Folders
from inference.files import printable
from inference.signals import Stopped

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_POLL_SECONDS = 0.1

_LOG_SECONDS = 2.0  # for the last of what it printed; a process that got away may hold the pipe

_ENGINE_FAILED = 125  # `docker run`'s exit code when the engine, not the container, is at fault

_LOG_TAIL_BYTES = 16384

_OUT_OF_MEMORY_WORDS = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError|\bMemoryError\b"
    r"|Cannot allocate memory|std::bad_alloc"
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "ok" (exit code 0), "crashed", "timeout" or "out of memory".
        reason: one line; None if ok.
        exit_code: of the container or command, negative where a signal ended a command; None at the
            time limit.
        seconds: wall clock from just before the start to the end.
    """

    status: str
    reason: str | None
    exit_code: int | None
    seconds: float


def run_case(
    target: Container | Command, case: str, folders: Folders, timeout: float, sampler: Sampler
) -> tuple[Outcome, Samples, SamplerCost]:
    """Run one case and measure it.

    Args:
        target: what to run.
        case: the case's name, for the container's.
        folders: the case's own.
        timeout: seconds after which the run is ended.
        sampler: a fresh one; runs as long as the case does.

    Returns:
        How it ended, the samples, and what sampling cost.

    Raises:
        EngineError: the engine did not start the container.
        KeyboardInterrupt: it was interrupted; nothing is left running.
    """
    if isinstance(target, Container):
        return _run_case(target, case, folders, timeout, sampler)
    with orphans_ended():
        return _run_case(target, case, folders, timeout, sampler)


def _run_case(
    target: Container | Command, case: str, folders: Folders, timeout: float, sampler: Sampler
) -> tuple[Outcome, Samples, SamplerCost]:
    name = container_name(target.image, case) if isinstance(target, Container) else case
    command_line = target.command_line(name, folders)
    if isinstance(target, Container):  # no part of the organisers' own; for `remove_abandoned`
        place = command_line.index("--name")
        command_line[place:place] = ["--label", owner_label()]
    process = None
    began = time.time()
    read_end, write_end = os.pipe()
    log = LogWriter(read_end, folders.log)
    log.start()
    try:
        with _interrupts_held():  # so that no process starts without being known here
            sampler.start()
            try:
                process = subprocess.Popen(
                    command_line,
                    env=target.environment(folders),
                    stdin=subprocess.DEVNULL,
                    stdout=write_end,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C reaches this process alone
                )
            finally:
                os.close(write_end)

        def over_limit() -> bool:
            if sampler.meter is None:
                sampler.meter = target.find_meter(name, process)
            return isinstance(target, Command) and sampler.ram_mb > target.memory_limit.mb

        end = _wait(process, sampler.started + timeout, over_limit)
        seconds = time.monotonic() - sampler.started
    except FileNotFoundError as error:
        raise EngineError(f"{error.filename} is not installed") from error
    finally:
        with _interrupts_held():
            try:
                samples, cost = sampler.stop()
            finally:
                if process is not None:
                    target.end(name, process, sampler.meter)
        log.join(_LOG_SECONDS)

    exit_code = process.returncode if end == "exit" else None
    text = log_tail(folders.log)
    if (
        exit_code == _ENGINE_FAILED
        and isinstance(target, Container)
        and not target.was_started(name, began)
    ):
        # The engine may warn of other things before it says what is wrong.
        said = [line for line in text.splitlines() if line.startswith("docker:")]
        raise EngineError(f"the container was not started: {printable((said or [text])[0])}")
    last_line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    last_line = printable(last_line)[:200]
    if exit_code == 0:
        status, reason = "ok", None
    elif end == "deadline":
        status, reason = "timeout", f"ended after {timeout:g} s"
    elif end == "over limit" or (
        isinstance(target, Container) and target.killed_for_memory(name, began)
    ):
        status, reason = "out of memory", f"over the limit of {target.memory_limit}"
    elif _OUT_OF_MEMORY_WORDS.search(text):
        status, reason = "out of memory", last_line
    else:
        status = "crashed"
        reason = f"exit code {exit_code}" + (f": {last_line}" if last_line else "")
    return Outcome(status, reason, exit_code, seconds), samples, cost


def _wait(
    process: subprocess.Popen, deadline: float, over_limit: Callable[[], bool]
) -> Literal["exit", "deadline", "over limit"]:
    """Wait for what comes first.

    Args:
        process: its end is noticed at once.
        deadline: by the monotonic clock.
        over_limit: asked every 0.1 s.
    """
    handle = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            if over_limit():
                return "over limit"
            if poll.poll(1000 * min(left, _POLL_SECONDS)):
                process.wait()
                return "exit"
        return "deadline"
    finally:
        os.close(handle)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into `Stopped`; what is ignored stays so."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C and its like take effect only at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handlers = {
        number: handler
        for number, handler in handlers.items()
        if handler not in (None, signal.SIG_IGN)  # as under nohup
    }
    for number in handlers:
        signal.signal(number, lambda caught, _: held.append(caught))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def log_tail(path: Path) -> str:
    """The last of what a run printed; empty where the disk was too full for a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
