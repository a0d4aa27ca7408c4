"""Memory and CPUs: the limits of container and machine, and what cases take of them."""

import contextlib
import os
import re
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

PROCESS_BYTES = 600 << 20
"""What interpreter, torch and the allocator's reserve take beside volumes and weights (measured:
550 MB with two threads and the slim weights)."""


def memory_limit(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may take.

    They are the least of the machine's memory, the limits of its control groups and those that
    `ulimit -v` and `-d` set. `root` is that of the file system; another one in tests.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    for folder in _control_groups(root, "memory"):
        texts = [_read(folder / name) for name in ("memory.max", "memory.limit_in_bytes")]
        limits += [int(text) for text in texts if text.isdecimal()]
    return min(limit for limit in limits if limit != resource.RLIM_INFINITY)


def cpu_limit(root: Path = Path("/")) -> int:
    """Return how many CPUs this process can keep busy, at least 1.

    They are the least of its affinity and of the quotas of its control groups (`docker run --cpus`,
    Kubernetes' `limits.cpu`), rounded down: who takes more is throttled.
    """
    limits = [len(os.sched_getaffinity(0))]
    for folder in _control_groups(root, "cpu"):
        of_v1 = " ".join(_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        for text in (_read(folder / "cpu.max"), of_v1):  # quota and period, microseconds
            if re.fullmatch(r"\d+ [1-9]\d*", text):
                quota, period = map(int, text.split())
                limits.append(quota // period)
    return max(1, min(limits))


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups and of those around them, of both versions."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, group = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            bases = {""}
        elif controller in controllers.split(","):
            bases = {controller, controllers}
        else:
            continue
        # In a container its own group is mounted at the base, whatever the path is called outside.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for base in bases:
            for depth in range(len(parts) + 1):
                yield root.joinpath("sys/fs/cgroup", base, *parts[:depth])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""


def case_bytes(file_bytes: int, voxels: int, voxel_bytes: int) -> int:
    """Return the most bytes that one volume takes in the pipeline, without the network.

    The file and its voxels while it is unpacked; then voxels, label map and what percentiles or
    components need. Percentiles of types wider than 16 bits are found on a copy.
    """
    raw = voxels * voxel_bytes
    beside = raw + voxels if voxel_bytes > 2 else 0
    return raw + max(file_bytes, beside, 2 * voxels)


class MemoryBudget:
    """Memory that cases share, `total` bytes: one waits until it fits beside the others."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._taken = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def take(self, need: int) -> None:
        """Wait until `need` bytes are free, and take them.

        Raises:
            ValueError: they are more than there ever are, or the run has ended.
        """
        if need > self.total:
            raise ValueError(
                f"it needs about {need / 1e9:.1f} GB of memory, {max(0, self.total) / 1e9:.1f} GB "
                "are there for it"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._taken + need <= self.total)
            if self._is_closed:
                raise ValueError("the run has ended")
            self._taken += need

    @contextlib.contextmanager
    def taken_if_free(self, need: int) -> Iterator[bool]:
        """Take `need` bytes for the block if they are free now; whether they are is its value."""
        with self._changed:
            free = self._taken + need <= self.total
            self._taken += need if free else 0
        try:
            yield free
        finally:
            self.give_back(need if free else 0)

    def give_back(self, amount: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._taken -= amount
            self._changed.notify_all()

    def close(self) -> None:
        """End whoever waits in `take`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
