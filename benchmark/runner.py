"""One case through a team's container or command: started as the organisers do, ended for certain.

The time is the wall clock around `docker container run`: container start, interpreter start,
imports and CUDA context are in it. However a run ends (by itself, by the time limit, by Ctrl-C),
its container is removed by name and its process group is ended before anything else happens.
"""

import contextlib
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from benchmark.sampler import Cgroup, ProcessTree, Sampler, SamplerCost, Samples, find_cgroup

PHASE_LOG = ".abdoseg_phases.jsonl"
"""Name of the phase log in a case's outputs folder."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_OUTPUTS = "/workspace/outputs/"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
_ENGINE_SECONDS = 60.0  # for the engine's answer to a question
_ENGINE_FAILED = 125  # `docker run`'s exit code when the engine, not the container, is at fault
_LOG_TAIL_BYTES = 16384
_OUT_OF_MEMORY_WORDS = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError|\bMemoryError\b"
    r"|Cannot allocate memory|std::bad_alloc"
)


class EngineError(RuntimeError):
    """The container engine cannot do what is asked; the message says what is wrong."""


@dataclass(frozen=True)
class MemoryLimit:
    """An amount of memory as `docker run -m` takes it, such as 28g.

    Attributes:
        amount: whole number of units.
        unit: "m" or "g", of 2**20 or 2**30 bytes.
    """

    amount: int
    unit: str

    @classmethod
    def parse(cls, text: str) -> "MemoryLimit":
        """Read "28g", "28G", "28gb" or "512m".

        Raises:
            ValueError: it is none of these.
        """
        match = re.fullmatch(r"([1-9]\d*)([mg])b?", text.lower())
        if not match:
            raise ValueError(f"a memory limit is written like 28g or 512m, not {text!r}")
        return cls(int(match[1]), match[2])

    @property
    def mb(self) -> int:
        """In MB."""
        return self.amount * (1024 if self.unit == "g" else 1)

    def __str__(self) -> str:
        return f"{self.amount}{self.unit}"


@dataclass(frozen=True)
class Folders:
    """Where one run reads and writes.

    Attributes:
        inputs, outputs: the case's own folders; nothing else is in them.
        log: the file that gets standard output and standard error.
    """

    inputs: Path
    outputs: Path
    log: Path


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


@dataclass(frozen=True)
class Container:
    """A team's image, run with the organisers' command line.

    Attributes:
        image: NAME:TAG.
        memory_limit: of RAM, and of shared memory.
        gpu: NVML's number of the device; None leaves `--gpus` out.
        phases: whether to ask for a phase log, which adds one `-e` to the command line.
    """

    image: str
    memory_limit: MemoryLimit
    gpu: int | None
    phases: bool

    def command_line(self, name: str, folders: Folders) -> list[str]:
        """The organisers' `docker container run`, for a container called `name`."""
        amount, unit = self.memory_limit.amount, self.memory_limit.unit
        return [
            *("docker", "container", "run", f"--shm-size={amount}{unit}b"),
            *("-m", f"{amount}{unit.upper()}"),
            *(("--gpus", f"device={self.gpu}") if self.gpu is not None else ()),
            *("--name", name, "--rm"),
            *("-v", f"{folders.inputs}/:/workspace/inputs/"),
            *("-v", f"{folders.outputs}/:{_OUTPUTS}"),
            *(("-e", f"ABDOSEG_PHASE_LOG={_OUTPUTS}{PHASE_LOG}") if self.phases else ()),
            *(self.image, "/bin/bash", "-c", "sh predict.sh"),
        ]

    def environment(self, folders: Folders) -> dict[str, str]:
        """The Docker client's environment: this process's own."""
        return dict(os.environ)

    def find_meter(self, name: str, process: subprocess.Popen) -> Cgroup | ProcessTree | None:
        """The cgroup of the container `name`, else its process tree; None before it runs."""
        answer = docker("container", "inspect", "--format", "{{.State.Pid}}", name)
        pid = int(answer.stdout) if answer.returncode == 0 else 0
        if pid == 0:
            return None
        try:
            return find_cgroup(pid) or ProcessTree(pid)
        except psutil.NoSuchProcess:
            return None

    def end(self, name: str, process: subprocess.Popen, meter: object) -> None:
        """Remove the container `name` if the client has not seen its end."""
        if process.poll() is None:
            # The client first: it must not start what is about to be removed.
            _end_group(process, signal.SIGKILL)
            remove_container(name)

    def killed_for_memory(self, name: str, began: float) -> bool:
        """Whether the kernel ended a process of the container `name`, by the engine's events."""
        answer = docker(
            *("events", "--since", f"{began:.6f}", "--until", f"{time.time():.6f}"),
            *("--filter", f"container={name}", "--filter", "event=oom", "--format", "{{.Action}}"),
        )
        return answer.stdout.strip() != ""


@dataclass(frozen=True)
class Command:
    """A local command, measured as a container would be, for machines without Docker.

    Attributes:
        template: for bash; `{inputs}` and `{outputs}` stand for the case's own folders.
        memory_limit: of the process tree's RSS, looked at every 0.1 s.
        gpu: NVML's number of the one device the command is to see; None changes nothing.
        phases: whether to ask for a phase log.
    """

    template: str
    memory_limit: MemoryLimit
    gpu: int | None
    phases: bool

    def command_line(self, name: str, folders: Folders) -> list[str]:
        """The command with the case's folders in it."""
        text = self.template.replace("{inputs}", shlex.quote(str(folders.inputs)))
        return ["/bin/bash", "-c", text.replace("{outputs}", shlex.quote(str(folders.outputs)))]

    def environment(self, folders: Folders) -> dict[str, str]:
        """This process's environment, with the device and the phase log."""
        environment = dict(os.environ)
        if self.gpu is not None:
            # CUDA's own order of devices is another than NVML's unless it is asked for.
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            environment["CUDA_VISIBLE_DEVICES"] = str(self.gpu)
        if self.phases:
            environment["ABDOSEG_PHASE_LOG"] = str(folders.outputs / PHASE_LOG)
        return environment

    def find_meter(self, name: str, process: subprocess.Popen) -> ProcessTree:
        """The command's process tree."""
        return ProcessTree(process.pid)

    def end(self, name: str, process: subprocess.Popen, meter: ProcessTree | None) -> None:
        """End the command's process group, and what has left the group."""
        _end_group(process, signal.SIGTERM, signal.SIGKILL)
        for survivor in meter.refresh() if meter else ():
            with contextlib.suppress(psutil.Error):
                survivor.kill()


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
    name = container_name(target.image, case) if isinstance(target, Container) else case
    process = None
    began = time.time()
    with folders.log.open("wb") as log:
        try:
            with _interrupts_held():  # so that no process starts without being known here
                sampler.start()
                process = subprocess.Popen(
                    target.command_line(name, folders),
                    env=target.environment(folders),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C reaches this process alone
                )

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

    exit_code = process.returncode if end == "exit" else None
    text = _tail(folders.log)
    if exit_code == _ENGINE_FAILED and text.startswith("docker:"):
        raise EngineError(f"the container was not started: {text.splitlines()[0]}")
    last_line = next((line for line in reversed(text.splitlines()) if line.strip()), "")[:200]
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


def container_name(image: str, case: str) -> str:
    """A name of its own for the container of one run of one case."""
    team = image.rpartition("/")[2].partition(":")[0]
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", f"{team}-{case}-{secrets.token_hex(4)}")


def docker(*arguments: str, seconds: float | None = _ENGINE_SECONDS) -> subprocess.CompletedProcess:
    """Ask the engine through its command line.

    Raises:
        EngineError: there is no `docker` command, or no answer within `seconds`.
    """
    try:
        return subprocess.run(
            ["docker", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise EngineError("there is no docker command here; use --command instead") from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"docker {arguments[0]} has not answered for {seconds:g} s") from error


def image_id(image: str) -> str | None:
    """The digest of an image's content, None where the engine has no such image.

    Raises:
        EngineError: the engine does not answer.
    """
    answer = docker("image", "inspect", "--format", "{{.Id}}", image)
    if answer.returncode == 0:
        return answer.stdout.strip()
    if "No such image" in answer.stderr:
        return None
    raise EngineError(f"the container engine does not answer: {answer.stderr.strip()}")


def load_archive(archive: Path) -> str:
    """Load a team's `docker save` file.

    Returns:
        The image that the organisers run: the file's name up to the first dot, in lower case, with
        the tag `latest`.

    Raises:
        EngineError: the file does not load, or holds no image of that name.
    """
    answer = docker("load", "-i", str(archive), seconds=None)
    if answer.returncode != 0:
        raise EngineError(f"docker does not load {archive}: {answer.stderr.strip()}")
    image = archive.name.partition(".")[0].lower() + ":latest"
    if image_id(image) is None:
        loaded = re.sub(r"Loaded image( ID)?: ", "", answer.stdout).split()
        raise EngineError(
            f"{archive.name} holds {', '.join(loaded) or 'no image'}, but the organisers run "
            f"{image}: name the image so before `docker save`"
        )
    return image


def remove_container(name: str) -> None:
    """Remove a container by name, also one that the engine is still about to create."""
    absent = 0
    for _ in range(20):
        try:
            docker("container", "rm", "-f", name)
            listed = docker("container", "ls", "-aq", "--filter", f"name=^/{name}$")
        except EngineError as error:
            print(f"container {name} may still be there: {error}", file=sys.stderr)
            return
        absent = absent + 1 if listed.returncode == 0 and not listed.stdout.strip() else 0
        if absent == 2:
            return
        time.sleep(0.25)
    print(f"container {name} is still there: end it with `docker rm -f {name}`", file=sys.stderr)


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


def _end_group(process: subprocess.Popen, *signals: signal.Signals) -> None:
    """Send signals to a process's group, each with time to obey; none of the group is left."""
    for number in signals:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)


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


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")
