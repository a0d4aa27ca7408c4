"""GPU memory, CPU and RAM against time, read on a schedule that does not drift.

The organisers' sampler sleeps 0.1 s between readings, so that its period is a little longer than
the 0.1 s by which their area is computed. Here tick k falls due at start + k * interval whatever
the earlier readings cost, every reading carries its own time, and what sampling costs is recorded.

Units: seconds, MB (2**20 bytes, as the organisers count), CPU in percent of the whole machine
(100 % is every core busy, as the organisers count).
"""

import contextlib
import math
import os
import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

import pynvml

from benchmark.containers.machine import INTERVAL, NO_GPU, Gpu
from benchmark.containers.meters import Cgroup, ProcessTree


@dataclass(frozen=True)
class Samples:
    """What was read at each tick; all lists are of one length, and a GPU list not read is None."""

    time_s: list[float]  # since the case's start
    gpu_used_mb: list[float] | None  # total − free
    gpu_reserved_mb: list[float] | None  # the driver's own part
    gpu_process_mb: list[float] | None  # of the case's processes
    cpu_percent: list[float]  # since the tick before
    ram_mb: list[float]


@dataclass(frozen=True)
class SamplerCost:
    """What sampling cost the machine, and how many ticks were late or missed."""

    source: str | None  # of CPU and RAM: "cgroup v1", "cgroup v2" or "process tree"
    samples: int
    missed_ticks: int  # that fell due while another reading lasted
    cpu_seconds: float  # of the sampling thread
    mean_reading_ms: float
    max_reading_ms: float
    max_late_ms: float  # the longest that a reading started after its tick
    gpu_error: str | None  # why reading the GPU stopped, if it did


def next_tick(tick: int, elapsed: float, interval: float) -> int:
    """Return the first tick after `tick` that is not yet past `elapsed` seconds from the start."""
    return max(tick + 1, math.ceil(elapsed / interval))


class Sampler:
    """A thread that reads a GPU and a meter at every tick, each `interval` s, until `stop`.

    Attributes:
        meter: whose CPU and RAM to read; may be set while sampling, as a container is known only
            once it runs. Without one both are 0.
        started: when `start` was called, by the monotonic clock.
        ram_mb: the last reading.
    """

    def __init__(self, gpu: Gpu = NO_GPU, interval: float = INTERVAL) -> None:
        self.meter: ProcessTree | Cgroup | None = None
        self.started = 0.0
        self.ram_mb = 0.0
        self._gpu = gpu
        self._interval = interval
        self._readings: list[tuple] = []  # in the order of `Samples`
        self._gpu_error: str | None = None
        self._cpu_seconds = 0.0
        self._missed = 0
        self._late: list[float] = []
        self._seconds: list[float] = []  # that each reading took
        self._thread_cpu = 0.0
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Take tick 0 now and go on in the background."""
        self.started = time.monotonic()
        self._thread.start()

    def stop(self) -> tuple[Samples, SamplerCost]:
        """Stop sampling and return what was read.

        Raises:
            Exception: whatever ended the thread before its time.
        """
        self._stopping.set()
        self._thread.join()
        if self._failure:
            raise self._failure
        columns = map(list, zip(*self._readings, strict=True))
        # A curve with a hole has no peak and no area to be trusted.
        curves: list[Any] = [None if None in column else column for column in columns]
        return Samples(*curves), SamplerCost(
            source=self.meter.source if self.meter else None,
            samples=len(self._readings),
            missed_ticks=self._missed,
            cpu_seconds=round(self._thread_cpu, 4),
            mean_reading_ms=round(1000 * statistics.fmean(self._seconds), 3),
            max_reading_ms=round(1000 * max(self._seconds), 3),
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
                start = time.monotonic()
                self._readings.append(self._read(start - self.started))
                end = time.monotonic()
                self._late.append(start - due)
                self._seconds.append(end - start)
                following = next_tick(tick, end - self.started, self._interval)
                self._missed += following - tick - 1
                tick = following
            self._thread_cpu = time.thread_time()
        except Exception as error:
            self._failure = error

    def _read(self, elapsed: float) -> tuple:
        gpu = self._read_gpu()
        cpu_seconds, self.ram_mb = self._cpu_seconds, 0.0
        if self.meter is not None:
            with contextlib.suppress(OSError):  # the container has ended
                cpu_seconds, self.ram_mb = self.meter.read()
        since = elapsed - self._readings[-1][0] if self._readings else elapsed
        used = cpu_seconds - self._cpu_seconds
        self._cpu_seconds = max(self._cpu_seconds, cpu_seconds)
        # The first reading of a container also has what it used since it started: at most 100 %.
        percent = 100 * used / (since * (os.cpu_count() or 1)) if since > 0 else 0.0
        percent = round(min(max(percent, 0.0), 100.0), 2)
        return (round(elapsed, 6), *gpu, percent, round(self.ram_mb, 3))

    def _read_gpu(self) -> tuple[float | None, float | None, float | None]:
        """Return MB used, reserved and of the case's processes."""
        if self._gpu.note or self._gpu_error:
            return None, None, None
        try:
            used, reserved = self._gpu.memory_mb()
        except pynvml.NVMLError as error:
            self._gpu_error = str(error)
            return None, None, None
        processes = self._gpu.processes_mb()
        if processes is None:
            return used, reserved, None
        own = (mb for pid, mb in processes.items() if pid not in self._gpu.idle_processes)
        return used, reserved, sum(own)
