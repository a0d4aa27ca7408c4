"""One case through a team's container or command: started as the organisers do, ended for certain.

The time is the wall clock around `docker container run`: container start, interpreter start,
imports and CUDA context are in it. However a run ends (by itself, by the time limit, by Ctrl-C),
its container is removed by name and its process group is ended before anything else happens.
"""

import contextlib
import ctypes
import os
import re
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmark.containers import engine
from benchmark.containers.engine import EngineError, docker
from benchmark.containers.meters import Cgroup, ProcessTree, find_cgroup
from benchmark.containers.outputs import LogWriter, log_tail
from benchmark.containers.sampler import Sampler, SamplerCost, Samples
from benchmark.options import size_mb
from inference.files import printable
from inference.phases import LOG_VARIABLE
from inference.signals import handling_stop_signals

PHASE_LOG = ".abdoseg_phases.jsonl"
"""Name of the phase log in a case's outputs folder."""

ORGANISERS_COMMAND = ("/bin/bash", "-c", "sh predict.sh")
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
_LOG_SECONDS = 2.0  # for the last of what is printed; what escaped may have the pipe open
_ENGINE_FAILED = 125  # `docker run`'s exit code when the engine, not the container, is at fault

_OUT_OF_MEMORY_WORDS = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError|\bMemoryError\b"
    r"|Cannot allocate memory|std::bad_alloc"
)


@dataclass(frozen=True)
class Folders:
    """Where one run reads and writes: folders of its own, and the file of what it prints."""

    inputs: Path
    outputs: Path
    log: Path


@dataclass(frozen=True)
class Container:
    """A team's image, run with the organisers' command line."""

    image: str  # NAME:TAG
    memory_limit: str  # of RAM and of shared memory, as "28g"
    gpu: str | None = None  # as `docker --gpus device=` takes it
    phases: bool = False  # whether to ask for a phase log, which adds one `-e`
    extra: tuple[str, ...] = ()  # more words for `docker container run`
    shared_memory: bool = True  # as much as RAM, or else the engine's default
    read_only_inputs: bool = False
    command: tuple[str, ...] = ORGANISERS_COMMAND  # another gets no folders

    def command_line(self, name: str, folders: Folders, *labels: str) -> list[str]:
        """Return the organisers' `docker container run`, for a container called `name`."""
        inputs = f"{folders.inputs}/:/workspace/inputs/{':ro' * self.read_only_inputs}"
        outputs = "/workspace/outputs/"
        mounts = ("-v", inputs, "-v", f"{folders.outputs}/:{outputs}")
        return [
            *("docker", "container", "run", *self.extra),
            *((f"--shm-size={self.memory_limit}b",) if self.shared_memory else ()),
            *("-m", self.memory_limit.upper()),
            *(("--gpus", f"device={self.gpu}") if self.gpu is not None else ()),
            *(word for label in labels for word in ("--label", label)),
            *("--name", name, "--rm"),
            *(mounts if self.command == ORGANISERS_COMMAND else ()),
            *(("-e", f"{LOG_VARIABLE}={outputs}{PHASE_LOG}") if self.phases else ()),
            *(self.image, *self.command),
        ]

    def environment(self, _folders: Folders) -> None:
        """Return None: the engine's client runs in this process's environment."""

    @property
    def shown_command(self) -> str:
        """The command line for a report, with names for what differs from case to case."""
        return shlex.join(
            self.command_line("NAME", Folders(Path("INPUTS"), Path("OUTPUTS"), Path()))
        )

    def find_meter(self, name: str) -> Cgroup | ProcessTree | None:
        """Return the cgroup of the container `name`, else its process tree; None before it runs."""
        answer = docker("container", "inspect", "--format", "{{.State.Pid}}", name)
        # While a container ends, the engine may answer with nothing.
        number = answer.stdout.strip() if answer.returncode == 0 else ""
        if not number.isdecimal() or int(number) == 0:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            return find_cgroup(int(number)) or ProcessTree(int(number))
        return None

    def had_event(self, event: str, name: str, since: float) -> bool:
        """Return whether the engine has an event ("start", "oom") of the container `name`."""
        period = ("--since", f"{since:.6f}", "--until", f"{time.time():.6f}")
        which = ("--filter", f"container={name}", "--filter", f"event={event}")
        return docker("events", *period, *which, "--format", "{{.Action}}").stdout.strip() != ""


@dataclass(frozen=True)
class Command:
    """A local command, measured as a container would be, for machines without Docker."""

    template: str  # for bash; `{inputs}` and `{outputs}` stand for the case's own folders
    memory_limit: str  # of the process tree's memory, as "28g"
    gpu: str | None = None  # the one device that it is to see; None changes nothing
    phases: bool = False

    image = None

    @property
    def shown_command(self) -> str:
        """The command for a report."""
        return self.template

    def command_line(self, _name: str, folders: Folders, *_labels: str) -> list[str]:
        """Return the command with the case's folders in it."""
        text = self.template.replace("{inputs}", shlex.quote(str(folders.inputs)))
        return ["/bin/bash", "-c", text.replace("{outputs}", shlex.quote(str(folders.outputs)))]

    def environment(self, folders: Folders) -> dict[str, str]:
        """Return this process's environment, with the device and the phase log."""
        environment = dict(os.environ)
        if self.gpu is not None:
            # CUDA's own order of devices is another than NVML's unless it is asked for.
            environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.gpu}
        if self.phases:
            environment[LOG_VARIABLE] = str(folders.outputs / PHASE_LOG)
        return environment


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    status: str  # "ok" (exit code 0), "crashed", "timeout" or "out of memory"
    reason: str | None  # one line; None if ok
    exit_code: int | None  # negative where a signal ended a command; None at the time limit
    seconds: float  # wall clock from just before the start to the end


def run_case(
    target: Container | Command, case: str, folders: Folders, timeout: float, sampler: Sampler
) -> tuple[Outcome, Samples, SamplerCost]:
    """Run one case and measure it by a fresh sampler; end it after `timeout` seconds.

    Raises:
        EngineError: the engine did not start the container.
        KeyboardInterrupt: it was interrupted; nothing is left running.
    """
    container = target if isinstance(target, Container) else None
    name = engine.container_name(container.image, case) if container else case
    process: subprocess.Popen | None = None
    since = time.time()
    log = LogWriter(folders.log)
    with _orphans_killed():
        try:
            with _interrupts_deferred():  # so that no process starts without being known here
                sampler.start()
                try:
                    process = subprocess.Popen(
                        target.command_line(name, folders, engine.owner_label()),
                        env=target.environment(folders),
                        stdin=subprocess.DEVNULL,
                        stdout=log.sink,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a terminal's Ctrl-C reaches this process alone
                    )
                finally:
                    log.start()
            limit = float("inf")
            if container:
                # In a thread: a slow engine is not to add to the case's time.
                arguments = (container, name, sampler, process)
                threading.Thread(target=_find_meter, args=arguments, daemon=True).start()
            else:
                sampler.meter = ProcessTree(process.pid)
                limit = size_mb(target.memory_limit)
            end = _wait(process, sampler.started + timeout, lambda: sampler.ram_mb > limit)
            seconds = time.monotonic() - sampler.started
        except FileNotFoundError as error:
            raise EngineError(f"{error.filename} is not installed") from error
        finally:
            with _interrupts_deferred():
                try:
                    samples, cost = sampler.stop()
                finally:
                    if process is not None:
                        _end(process, name if container else None)
            log.join(_LOG_SECONDS)

    text = log_tail(folders.log)
    last_line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    last_line = printable(last_line)[:200]
    exit_code = process.returncode if end == "exit" else None
    if container and exit_code == _ENGINE_FAILED and not container.had_event("start", name, since):
        # The engine may print warnings before its error.
        lines = [line for line in text.splitlines() if line.startswith("docker:")]
        raise EngineError(f"the container was not started: {printable((lines or [text])[0])}")
    status, reason = "crashed", f"exit code {exit_code}" + (f": {last_line}" if last_line else "")
    if exit_code == 0:
        return Outcome("ok", None, exit_code, seconds), samples, cost
    if end == "deadline":
        status, reason = "timeout", f"ended after {timeout:g} s"
    elif end == "over limit" or (container and container.had_event("oom", name, since)):
        status, reason = "out of memory", f"over the limit of {target.memory_limit}"
    elif _OUT_OF_MEMORY_WORDS.search(text):
        status, reason = "out of memory", last_line
    return Outcome(status, reason, exit_code, seconds), samples, cost


def _find_meter(target: Container, name: str, sampler: Sampler, process: subprocess.Popen) -> None:
    with contextlib.suppress(EngineError):
        while sampler.meter is None and process.poll() is None:
            sampler.meter = target.find_meter(name)
            time.sleep(_POLL_SECONDS)


def _wait(process: subprocess.Popen, deadline: float, over_limit: Callable[[], bool]) -> str:
    """Wait for "exit", noticed at once, "deadline" (monotonic clock) or "over limit"."""
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


def _end(process: subprocess.Popen, container: str | None) -> None:
    """End what still runs of a case: its process group, and its container."""
    if container and process.poll() is not None:
        return
    # Of a container the client: it must not start what is about to be removed.
    for number in (signal.SIGKILL,) if container else (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    if container:
        engine.remove_container(container)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C and its like take effect only at the end of the block."""
    caught: list[int] = []
    try:
        with handling_stop_signals(lambda number, _: caught.append(number)):
            yield
    finally:
        if caught:
            signal.raise_signal(caught[0])


@contextlib.contextmanager
def _orphans_killed() -> Iterator[None]:
    """Kill whatever still runs at the end of the block that it started, directly or not.

    Daemons leave the process group, by `setsid` or two forks. A process may ask Linux for the
    orphans below it (prctl 36, PR_SET_CHILD_SUBREAPER); they then become its children, where they
    would else have become the system's.
    """
    own = psutil.Process()
    before = set(own.children())
    adopt = ctypes.CDLL(None).prctl
    adopt(36, 1, 0, 0, 0)
    try:
        yield
    finally:
        for _ in range(20):  # what is ended may have started another just before
            left = [child for child in own.children() if child not in before]
            for child in left:
                with contextlib.suppress(psutil.Error):
                    for member in (*child.children(recursive=True), child):
                        with contextlib.suppress(psutil.Error):
                            member.kill()
            psutil.wait_procs(left, 2.0)
            if not left:
                break
        adopt(36, 0, 0, 0, 0)
