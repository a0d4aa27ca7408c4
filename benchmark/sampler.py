"""Device memory, CPU and RAM against time, read on a schedule that does not drift.

The organisers' sampler sleeps 0.1 s between readings, so that its period is a little longer than
the 0.1 s by which their area is computed. Here tick k falls due at start + k * interval whatever
the earlier readings cost, every reading carries its own time, and what sampling costs is kept.

Units: seconds, MB (2**20 bytes, as the organisers count), CPU in percent of the whole machine
(100 % is every core busy, as the organisers count).
"""

import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pynvml

BYTES_PER_MB = 2**20


class GpuUnavailable(RuntimeError):
    """NVML gives no device to measure; the message says why, in one line."""


class Gpu:
    """One NVIDIA device as NVML sees it.

    Attributes:
        index: NVML's number of the device, which is the number `docker --gpus device=N` takes.
        name, driver: of the device and of its driver.
        total_mb: the device's memory.
    """

    def __init__(self, index: int) -> None:
        """Open NVML's device `index`.

        Raises:
            GpuUnavailable: no NVML library, no driver or no device on this machine.
            IndexError: there are devices, but not this one.
        """
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise GpuUnavailable(f"no NVIDIA driver on this machine ({error})") from error
        try:
            count = pynvml.nvmlDeviceGetCount()
            if count == 0:
                raise GpuUnavailable("NVML finds no device on this machine")
            if not 0 <= index < count:
                raise IndexError(f"no GPU {index}: NVML finds {count}, numbered from 0")
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self.index = index
            self.name: str = pynvml.nvmlDeviceGetName(self._handle)
            self.driver: str = pynvml.nvmlSystemGetDriverVersion()
            self._has_reserved = self._driver_tells_reserved()
            self.total_mb = self._memory_info().total / BYTES_PER_MB
        except pynvml.NVMLError as error:
            pynvml.nvmlShutdown()
            raise GpuUnavailable(f"NVML cannot read GPU {index} ({error})") from error
        except (GpuUnavailable, IndexError):
            pynvml.nvmlShutdown()
            raise

    def _driver_tells_reserved(self) -> bool:
        try:
            pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2)
        except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported):
            return False
        return True

    def _memory_info(self) -> pynvml.c_nvmlMemory_t | pynvml.c_nvmlMemory_v2_t:
        version = pynvml.nvmlMemory_v2 if self._has_reserved else None
        return pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=version)

    def memory_mb(self) -> tuple[float, float | None]:
        """Total − free of the whole device (the challenge's measure), and the driver's own part.

        Raises:
            pynvml.NVMLError: the device no longer answers.
        """
        info = self._memory_info()
        reserved = info.reserved / BYTES_PER_MB if self._has_reserved else None
        return (info.total - info.free) / BYTES_PER_MB, reserved

    def processes_mb(self) -> dict[int, float] | None:
        """Memory of each compute process by process id; None where the driver does not tell."""
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:
            return None
        if any(process.usedGpuMemory is None for process in processes):
            return None
        return {process.pid: process.usedGpuMemory / BYTES_PER_MB for process in processes}

    def close(self) -> None:
        """Leave NVML."""
        pynvml.nvmlShutdown()


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
            cpu_seconds = int(self.cpu.read_text()) / 1e9
            names = ("total_rss", "total_mapped_file")
        else:
            cpu_seconds = _statistics(self.cpu)["usage_usec"] / 1e6
            names = ("anon", "file_mapped")
        memory = _statistics(self.memory)
        return cpu_seconds, sum(memory[name] for name in names) / BYTES_PER_MB


def _statistics(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in map(str.split, path.read_text().splitlines())}


def find_cgroup(pid: int, proc: Path = Path("/proc")) -> Cgroup | None:
    """The cgroup that accounts for process `pid`; None where its files are not to be seen.

    Args:
        pid: the container's first process, as the host numbers it.
        proc: where the proc file system is mounted.
    """
    try:
        memberships = (proc / str(pid) / "cgroup").read_text().splitlines()
        mounts = [line.split() for line in (proc / "mounts").read_text().splitlines()]
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


@dataclass
class Samples:
    """What was read at each tick; all lists are of one length.

    Attributes:
        time_s: since the case's start.
        gpu_used_mb: device total − free, the challenge's measure.
        gpu_reserved_mb: the driver's own part of it.
        gpu_process_mb: memory of the compute processes that were not there before the case.
        cpu_percent: of the whole machine, since the tick before.
        ram_mb: resident memory.

    A GPU list is None where nothing tells it.
    """

    time_s: list[float] = field(default_factory=list)
    gpu_used_mb: list[float] | None = field(default_factory=list)
    gpu_reserved_mb: list[float] | None = field(default_factory=list)
    gpu_process_mb: list[float] | None = field(default_factory=list)
    cpu_percent: list[float] = field(default_factory=list)
    ram_mb: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class SamplerCost:
    """What sampling cost the machine, and how well the schedule was kept.

    Attributes:
        source: where CPU and RAM come from ("cgroup v1", "cgroup v2", "process tree"), if anywhere.
        samples, missed_ticks: readings taken, and readings that fell due while another lasted.
        cpu_seconds: CPU time of the sampling thread.
        mean_reading_ms, max_reading_ms: wall time of a reading.
        max_late_ms: the longest that a reading began after its tick.
        gpu_error: why reading the device stopped, if it did.
    """

    source: str | None
    samples: int
    missed_ticks: int
    cpu_seconds: float
    mean_reading_ms: float
    max_reading_ms: float
    max_late_ms: float
    gpu_error: str | None


def next_tick(tick: int, elapsed: float, interval: float) -> int:
    """The first tick after `tick` that is not yet past, `elapsed` seconds after the start."""
    return max(tick + 1, int(np.ceil(elapsed / interval)))


class Sampler:
    """A thread that reads a device and a meter at every tick from `start` to `stop`.

    Attributes:
        meter: whose CPU and RAM to read; may be set while sampling, as a container is known only
            once it runs. Without one both are 0.
        started: when `start` was called, by the monotonic clock.
        ram_mb: the last reading.
    """

    def __init__(
        self, gpu: Gpu | None, interval: float, other_processes: Iterable[int] = ()
    ) -> None:
        """Prepare to sample every `interval` seconds.

        Args:
            gpu: the device, or None to leave the GPU lists out.
            interval: seconds between ticks.
            other_processes: ids of processes on the device that are not the case's own.
        """
        self.meter: ProcessTree | Cgroup | None = None
        self.started = 0.0
        self.ram_mb = 0.0
        self._gpu = gpu
        self._interval = interval
        self._other_processes = frozenset(other_processes)
        self._samples = Samples()
        if gpu is None:
            self._leave_gpu_out()
        self._gpu_error: str | None = None
        self._cpu_seconds = 0.0
        self._missed = 0
        self._late: list[float] = []
        self._readings: list[float] = []
        self._thread_cpu = 0.0
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Take tick 0 now and go on in the background."""
        self.started = time.monotonic()
        self._thread.start()

    def stop(self) -> tuple[Samples, SamplerCost]:
        """End sampling and hand over what was read.

        Raises:
            Exception: whatever ended the thread before its time.
        """
        self._stopping.set()
        self._thread.join()
        if self._failure:
            raise self._failure
        samples = self._samples
        return samples, SamplerCost(
            source=self.meter.source if self.meter else None,
            samples=len(samples.time_s),
            missed_ticks=self._missed,
            cpu_seconds=round(self._thread_cpu, 4),
            mean_reading_ms=round(1000 * float(np.mean(self._readings)), 3),
            max_reading_ms=round(1000 * max(self._readings), 3),
            max_late_ms=round(1000 * max(self._late), 3),
            gpu_error=self._gpu_error,
        )

    def _run(self) -> None:
        try:
            tick = 0
            while True:
                due = self.started + tick * self._interval
                if self._stopping.wait(max(0.0, due - time.monotonic())) and tick > 0:
                    break
                began = time.monotonic()
                self._read(began - self.started)
                ended = time.monotonic()
                self._late.append(began - due)
                self._readings.append(ended - began)
                following = next_tick(tick, ended - self.started, self._interval)
                self._missed += following - tick - 1
                tick = following
            self._thread_cpu = time.thread_time()
        except Exception as error:
            self._failure = error

    def _read(self, elapsed: float) -> None:
        samples = self._samples
        if samples.gpu_used_mb is not None:
            self._read_gpu()
        cpu_seconds, self.ram_mb = self._read_meter()
        since = elapsed - samples.time_s[-1] if samples.time_s else elapsed
        used = cpu_seconds - self._cpu_seconds
        self._cpu_seconds = max(self._cpu_seconds, cpu_seconds)
        # The first reading of a container also holds what it used since it started: at most 100 %.
        percent = 100 * used / (since * os.cpu_count()) if since > 0 else 0.0
        samples.cpu_percent.append(round(min(max(percent, 0.0), 100.0), 2))
        samples.ram_mb.append(round(self.ram_mb, 3))
        samples.time_s.append(round(elapsed, 6))

    def _read_meter(self) -> tuple[float, float]:
        if self.meter is None:
            return self._cpu_seconds, 0.0
        try:
            return self.meter.read()
        except OSError:
            return self._cpu_seconds, 0.0

    def _leave_gpu_out(self) -> None:
        samples = self._samples
        samples.gpu_used_mb = samples.gpu_reserved_mb = samples.gpu_process_mb = None

    def _read_gpu(self) -> None:
        samples = self._samples
        try:
            used, reserved = self._gpu.memory_mb()
        except pynvml.NVMLError as error:
            # A curve with a hole has no peak and no area to be trusted.
            self._gpu_error = str(error)
            self._leave_gpu_out()
            return
        samples.gpu_used_mb.append(used)
        if samples.gpu_reserved_mb is not None:
            if reserved is None:
                samples.gpu_reserved_mb = None
            else:
                samples.gpu_reserved_mb.append(reserved)
        if samples.gpu_process_mb is not None:
            processes = self._gpu.processes_mb()
            if processes is None:
                samples.gpu_process_mb = None
            else:
                own = (mb for pid, mb in processes.items() if pid not in self._other_processes)
                samples.gpu_process_mb.append(sum(own))


def flare_area(samples: Sequence[float], interval: float, tolerance: float = 0.0) -> float:
    """Area under a curve by the organisers' rule: round(sum(samples) * interval).

    Nothing is subtracted but the tolerance, no time stamp is used, and each sample stands for one
    interval (`load_json.py` of the organisers, where the interval is 0.1 s).

    Args:
        samples: one reading a tick, in MB.
        interval: seconds.
        tolerance: MB that cost nothing; each sample counts as max(0, sample − tolerance).

    Returns:
        The area in MB·s, a whole number.
    """
    return float(np.round(np.maximum(np.asarray(samples) - tolerance, 0).sum() * interval))


def true_area(times: Sequence[float], samples: Sequence[float], tolerance: float = 0.0) -> float:
    """Area under a curve by the trapezoidal rule over the times of the readings.

    Args:
        times: seconds, one for each sample.
        samples: MB.
        tolerance: MB that cost nothing; each sample counts as max(0, sample − tolerance).

    Returns:
        The area in MB·s from the first reading to the last.
    """
    return float(np.trapezoid(np.maximum(np.asarray(samples) - tolerance, 0), times))
