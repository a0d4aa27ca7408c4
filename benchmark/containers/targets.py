"""What can be measured: a team's container, run as the organisers do, or a local command."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmark.containers.engine import docker, remove_container
from benchmark.containers.meters import Cgroup, ProcessTree, find_cgroup

PHASE_LOG = ".abdoseg_phases.jsonl"
"""Name of the phase log in a case's outputs folder."""

_OUTPUTS = "/workspace/outputs/"

_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL


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
        # While a container ends, the engine may answer with nothing.
        number = answer.stdout.strip() if answer.returncode == 0 else ""
        pid = int(number) if number.isdecimal() else 0
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

    def was_started(self, name: str, began: float) -> bool:
        """Whether the engine started the container `name`; then what it says is the team's."""
        answer = docker(
            *("events", "--since", f"{began:.6f}", "--until", f"{time.time():.6f}"),
            *("--filter", f"container={name}", "--filter", "event=start"),
            *("--format", "{{.Action}}"),
        )
        return answer.stdout.strip() != ""

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


def _end_group(process: subprocess.Popen, *signals: signal.Signals) -> None:
    """Send signals to a process's group, each with time to obey; none of the group is left."""
    for number in signals:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
