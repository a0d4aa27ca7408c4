"""CPU time and memory of what is measured: a process tree, or a container's cgroup.

Files in shared memory (/dev/shm) are counted whether a process has them mapped or not. No account
separates mapped shared memory from other mapped files, so what processes have mapped of it
(`RssShmem`) is taken off once.
"""

import contextlib
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmark.containers.machine import BYTES_PER_MB

_SHARED_MEMORY = "/dev/shm"


def _mapped_shared_bytes(pids: Iterable[int | str], proc: Path = Path("/proc")) -> int:
    """Return the shared memory that processes have mapped, counted once for each process."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has just ended
            status = (proc / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
            if found := re.search(r"^RssShmem:\s*(\d+)", status, re.MULTILINE):
                total += int(found[1]) * 1024
    return total


class ProcessTree:
    """CPU time and resident memory of a process and all that it started.

    A descendant once seen stays a member when its parent ends. Pages that members share are counted
    once for each, as sums of RSS are. Shared memory is what /dev/shm has grown by since the start.
    """

    source = "process tree"

    def __init__(self, pid: int) -> None:
        """Take the process `pid` as the root; psutil.NoSuchProcess if there is none."""
        self._members = {pid: psutil.Process(pid)}
        self._shared_before = self._shared_bytes()

    def _shared_bytes(self) -> int:
        with contextlib.suppress(OSError):
            return shutil.disk_usage(_SHARED_MEMORY).used
        return 0

    def read(self) -> tuple[float, float]:
        """Return CPU seconds used, those of ended and awaited children included, and MB."""
        cpu_seconds = ram_bytes = 0.0
        for process in self.refresh():
            try:
                with process.oneshot():
                    cpu_seconds += sum(process.cpu_times()[:4])  # own and children's
                    ram_bytes += process.memory_info().rss
            except psutil.Error:
                continue  # it ended just now; its time is its parent's by the next reading
        if (grown := self._shared_bytes() - self._shared_before) > 0:
            ram_bytes += grown - min(grown, _mapped_shared_bytes(self._members))
        return cpu_seconds, ram_bytes / BYTES_PER_MB

    def refresh(self) -> list[psutil.Process]:
        """Return the members that run now."""
        for process in list(self._members.values()):
            with contextlib.suppress(psutil.Error):
                for child in process.children(recursive=True):
                    self._members.setdefault(child.pid, child)
        self._members = {
            pid: process for pid, process in self._members.items() if process.is_running()
        }
        return list(self._members.values())


@dataclass(frozen=True)
class Cgroup:
    """CPU time and memory of a container: anonymous memory, mapped files and shared memory."""

    version: int  # of the interface, 1 or 2
    cpu: Path  # its folders under the two controllers, the same in version 2
    memory: Path

    @property
    def source(self) -> str:
        """Where the numbers come from, for the report."""
        return f"cgroup v{self.version}"

    def read(self) -> tuple[float, float]:
        """Return CPU seconds used so far and memory in MB.

        Raises:
            OSError: the container has ended.
        """
        prefix, names = "", ("anon", "file_mapped", "shmem")
        if self.version == 1:
            cpu_seconds = int((self.cpu / "cpuacct.usage").read_text(encoding="utf-8")) / 1e9
            prefix, names = "total_", ("rss", "mapped_file", "shmem")
        else:
            cpu_seconds = _statistics(self.cpu / "cpu.stat")["usage_usec"] / 1e6
        memory = _statistics(self.memory / "memory.stat")
        own, mapped, shared = (memory.get(prefix + name, 0) for name in names)
        if shared:
            pids = (self.memory / "cgroup.procs").read_text(encoding="utf-8").split()
            shared -= min(shared, mapped, _mapped_shared_bytes(pids))
        return cpu_seconds, (own + mapped + shared) / BYTES_PER_MB


def _statistics(path: Path) -> dict[str, int]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: int(value) for name, value in map(str.split, lines)}


def find_cgroup(pid: int, proc: Path = Path("/proc")) -> Cgroup | None:
    """Return the cgroup of a process of the host; None where its files are not to be seen."""
    try:
        memberships = (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (proc / "mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths: dict[str, str] = {}  # of each v1 controller; "" is the v2 hierarchy
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    places: dict[str, Path] = {}
    for _, place, kind, options, *_ in map(str.split, mounts):
        if kind in ("cgroup", "cgroup2"):
            for option in options.split(",") if kind == "cgroup" else [""]:
                places.setdefault(option, Path(place))
    for version, cpu, memory in ((1, "cpuacct", "memory"), (2, "", "")):
        if {cpu, memory} <= places.keys() & paths.keys():
            found = Cgroup(version, places[cpu] / paths[cpu], places[memory] / paths[memory])
            usage = "cpuacct.usage" if version == 1 else "cpu.stat"
            if (found.cpu / usage).is_file() and (found.memory / "memory.stat").is_file():
                return found
    return None
