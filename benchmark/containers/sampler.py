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
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pynvml

from benchmark.containers.gpu import Gpu
from benchmark.containers.meters import Cgroup, ProcessTree


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
