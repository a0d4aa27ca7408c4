"""CPU time and resident memory of what is measured: a process tree, or a container's cgroup."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmark.containers.gpu import BYTES_PER_MB


class ProcessTree:
    """CPU time and resident memory of a process and all that it started.

    A descendant once seen stays a member when its parent ends. Pages that members share are counted
    once for each, as sums of RSS are.
    """

    source = "process tree"

    def __init__(self, pid: int) -> None:
        """Take the process `pid` as the root.

        Raises:
            psutil.NoSuchProcess: there is none.
        """
        self._members = {pid: psutil.Process(pid)}

    def read(self) -> tuple[float, float]:
        """CPU seconds used so far, those of ended and awaited children included, and RSS in MB."""
        cpu_seconds = ram_bytes = 0.0
        for process in self.refresh():
            try:
                with process.oneshot():
                    cpu_seconds += sum(
                        process.cpu_times()[:4]
                    )  # own and children's, user and system
                    ram_bytes += process.memory_info().rss
            except psutil.Error:
                continue  # it ended just now; its time is its parent's by the next reading
        return cpu_seconds, ram_bytes / BYTES_PER_MB

    def refresh(self) -> list[psutil.Process]:
        """The members that run now."""
        for process in list(self._members.values()):
            try:
                for child in process.children(recursive=True):
                    self._members.setdefault(child.pid, child)
            except psutil.Error:
                continue
        self._members = {
            pid: process for pid, process in self._members.items() if process.is_running()
        }
        return list(self._members.values())


@dataclass(frozen=True)
class Cgroup:
    """CPU time and resident memory of a container, from the kernel's account of its cgroup.

    Attributes:
        version: of the cgroup interface, 1 or 2.
        cpu: the file with the CPU time used.
        memory: the file with the memory statistics.
    """

    version: int
    cpu: Path
    memory: Path

    @property
    def source(self) -> str:
        """Where the numbers come from, for the report."""
        return f"cgroup v{self.version}"

    def read(self) -> tuple[float, float]:
        """CPU seconds used so far, and resident memory (anonymous and mapped files) in MB.

        Raises:
            OSError: the container has ended.
        """
        if self.version == 1:
            cpu_seconds = int(self.cpu.read_text(encoding="utf-8")) / 1e9
            names = ("total_rss", "total_mapped_file")
        else:
            cpu_seconds = _statistics(self.cpu)["usage_usec"] / 1e6
            names = ("anon", "file_mapped")
        memory = _statistics(self.memory)
        return cpu_seconds, sum(memory[name] for name in names) / BYTES_PER_MB


def _statistics(path: Path) -> dict[str, int]:
    return {
        name: int(value)
        for name, value in map(str.split, path.read_text(encoding="utf-8").splitlines())
    }


def find_cgroup(pid: int, proc: Path = Path("/proc")) -> Cgroup | None:
    """The cgroup that accounts for process `pid`; None where its files are not to be seen.

    Args:
        pid: the container's first process, as the host numbers it.
        proc: where the proc file system is mounted.
    """
    try:
        memberships = (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = [
            line.split() for line in (proc / "mounts").read_text(encoding="utf-8").splitlines()
        ]
    except OSError:
        return None
    paths: dict[str, str] = {}  # of each v1 controller; "" is the v2 hierarchy
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    v1 = {
        option: Path(mount[1])
        for mount in mounts
        if mount[2] == "cgroup"
        for option in mount[3].split(",")
    }
    v2 = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)

    candidates = []
    if {"cpuacct", "memory"} <= v1.keys() & paths.keys():
        candidates.append(
            Cgroup(
                version=1,
                cpu=v1["cpuacct"] / paths["cpuacct"] / "cpuacct.usage",
                memory=v1["memory"] / paths["memory"] / "memory.stat",
            )
        )
    if v2 is not None and "" in paths:
        folder = v2 / paths[""]
        candidates.append(Cgroup(version=2, cpu=folder / "cpu.stat", memory=folder / "memory.stat"))
    return next((c for c in candidates if c.cpu.is_file() and c.memory.is_file()), None)
