"""One case through a team's container or command: started as the organisers do, ended for certain.

The time is the wall clock around `docker container run`: container start, interpreter start, imports
and CUDA context are in it. However a run ends (by itself, by the time limit, by Ctrl-C), its
container is removed by name and its process group is ended before anything else happens.
"""

import contextlib
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmark.sampler import ProcessTree, Sampler, find_cgroup

INPUTS = "/workspace/inputs/"
OUTPUTS = "/workspace/outputs/"

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""

_DOCKER_FAILED = 125
"""`docker run`'s exit code when the engine, not the container, is at fault."""

_OUT_OF_MEMORY_WORDS = re.compile(
    rb"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError|\bMemoryError\b"
    rb"|Cannot allocate memory|std::bad_alloc"
)


class EngineError(RuntimeError):
    """The container engine cannot do what is asked; the message says what to do."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "ok" (exit code 0), "crashed", "timeout" or "out of memory".
        reason: one line, None if ok.
        exit_code: of the container or command; negative is the signal that ended a command; None
            where it was ended by the time limit.
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
        memory_limit: of RAM and of shared memory, such as "28g".
        gpu: NVML's number of the device; None leaves `--gpus` out.
    """

    image: str
    memory_limit: str
    gpu: int | None

    def command_line(
        self, name: str, inputs: Path, outputs: Path, environment: Mapping[str, str]
    ) -> list[str]:
        """The organisers' `docker container run`.

        Args:
            name: of the container.
            inputs, outputs: the case's own folders.
            environment: variables to set inside; where empty, the line is the organisers' own.
        """
        amount, unit = split_memory_limit(self.memory_limit)
        return [
            *("docker", "container", "run", f"--shm-size={amount}{unit}b"),
            *("-m", f"{amount}{unit.upper()}"),
            *(("--gpus", f"device={self.gpu}") if self.gpu is not None else ()),
            *("--name", name, "--rm"),
            *("-v", f"{inputs}/:{INPUTS}", "-v", f"{outputs}/:{OUTPUTS}"),
            *(word for item in environment.items() for word in ("-e", "=".join(item))),
            *(self.image, "/bin/bash", "-c", "sh predict.sh"),
        ]

    def run(
        self,
        case: str,
        inputs: Path,
        outputs: Path,
        phase_log: str | None,
        log: Path,
        timeout: float,
        sampler: Sampler,
    ) -> Outcome:
        """Run the container on one case's folders; see `Command.run`.

        Raises:
            EngineError: the engine did not start the container.
        """
        team = self.image.rpartition("/")[2].partition(":")[0]
        name = re.sub(r"[^a-zA-Z0-9_.-]", "_", f"{team}-{case}-{secrets.token_hex(4)}")
        environment = {"ABDOSEG_PHASE_LOG": OUTPUTS + phase_log} if phase_log else {}
        command_line = self.command_line(name, inputs, outputs, environment)
        started_at = time.time()
        with _started(command_line, None, log, sampler) as process:
            try:
                ended = _wait(process, timeout, sampler, lambda: _find_meter(name))
            finally:
                with _uninterrupted():
                    if process.poll() is None:
                        _end_group(process)
                        remove_container(name)
        seconds = time.monotonic() - sampler.started if ended is None else ended
        exit_code = process.returncode if ended is not None else None
        text = _tail(log)
        if exit_code == _DOCKER_FAILED and text.startswith(b"docker:"):
            raise EngineError(
                f"docker did not start the container: {_first_line(text)}"
                + (
                    " (is the NVIDIA Container Toolkit installed?)"
                    if self.gpu is not None and b"device driver" in text
                    else ""
                )
            )
        killed = exit_code not in (0, None) and _killed_for_memory(name, started_at)
        limit = f"the memory limit of {self.memory_limit}" if killed else None
        return _outcome(exit_code, seconds, timeout, text, limit)


@dataclass(frozen=True)
class Command:
    """A local command, measured as a container would be, for machines without Docker.

    Attributes:
        template: a shell command; `{inputs}` and `{outputs}` stand for the case's own folders.
        memory_limit: of the process tree's RSS, such as "28g", watched every 0.1 s.
        gpu: the device that the command is to see, None to leave its environment as it is.
    """

    template: str
    memory_limit: str
    gpu: int | None

    def command_line(self, inputs: Path, outputs: Path) -> list[str]:
        """The command with its folders, for a shell."""
        text = self.template.replace("{inputs}", shlex.quote(str(inputs)))
        return ["/bin/bash", "-c", text.replace("{outputs}", shlex.quote(str(outputs)))]

    def run(
        self,
        case: str,
        inputs: Path,
        outputs: Path,
        phase_log: str | None,
        log: Path,
        timeout: float,
        sampler: Sampler,
    ) -> Outcome:
        """Run the command on one case's folders and wait for its end.

        Args:
            case: the case's name.
            inputs, outputs: the case's own folders; nothing else is in them.
            phase_log: name of a file in `outputs` that ABDOSEG_PHASE_LOG is to name, or None.
            log: where standard output and standard error go.
            timeout: seconds after which the run is ended.
            sampler: is started with the run, and given its meter; the caller stops it.
        """
        environment = dict(os.environ)
        if phase_log:
            environment["ABDOSEG_PHASE_LOG"] = str(outputs / phase_log)
        if self.gpu is not None:
            environment |= {
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": str(self.gpu),
            }
        amount, unit = split_memory_limit(self.memory_limit)
        limit_mb = amount * {"k": 2**-10, "m": 1, "g": 2**10}[unit]
        with _started(self.command_line(inputs, outputs), environment, log, sampler) as process:
            sampler.meter = tree = ProcessTree(process.pid)
            over_limit = threading.Event()

            def watch_memory() -> None:
                if sampler.ram_mb > limit_mb:
                    over_limit.set()
                    _end_group(process)

            try:
                ended = _wait(process, timeout, sampler, watch_memory)
            finally:
                with _uninterrupted():
                    _end_group(process)
                    for survivor in tree.refresh():
                        with contextlib.suppress(psutil.Error):
                            survivor.kill()
        seconds = time.monotonic() - sampler.started if ended is None else ended
        exit_code = process.returncode if ended is not None else None
        limit = f"the memory limit of {self.memory_limit}" if over_limit.is_set() else None
        return _outcome(exit_code, seconds, timeout, _tail(log), limit)
