"""The device before the first case: whether there is one, and what is taken of its memory."""

import statistics
import time
from dataclasses import dataclass

from benchmark.containers.gpu import Gpu, GpuUnavailable
from benchmark.messages import UsageError, say

_IDLE_SAMPLES = 10

_BUSY_MB = 256.0
"""Idle memory, the driver's own part left out, above which the device is taken to be in use."""


@dataclass(frozen=True)
class Idle:
    """The device before the first case.

    Attributes:
        gpu_mb: mean of total − free; None without a device.
        processes: ids of the compute processes already there.
    """

    gpu_mb: float | None
    processes: tuple[int, ...]


def open_gpu(index: int) -> tuple[Gpu | None, str | None]:
    """The device to measure, or why there is none, which is said.

    Raises:
        UsageError: there are devices, but not this one.
    """
    try:
        return Gpu(index), None
    except GpuUnavailable as error:
        note = f"{error}; `--gpus` is left out"
        say(f"GPU columns stay empty: {note}")
        return None, note
    except IndexError as error:
        raise UsageError(f"--gpu {index}: {error}") from error


def read_idle(gpu: Gpu | None, interval: float) -> Idle:
    """Sample the device before the first case, and warn where it is in use."""
    if gpu is None:
        return Idle(None, ())
    readings = []
    for _ in range(_IDLE_SAMPLES):
        readings.append(gpu.memory_mb())
        time.sleep(interval)
    idle_mb = statistics.fmean(used for used, _ in readings)
    processes = gpu.processes_mb() or {}
    own_mb = idle_mb - (readings[-1][1] or 0.0)
    if processes or own_mb > _BUSY_MB:
        say(
            f"warning: GPU {gpu.index} is not idle: {idle_mb:,.0f} MB are taken"
            + (f" (processes {', '.join(map(str, processes))})" if processes else "")
            + ", which the official area counts in every sample"
        )
    return Idle(idle_mb, tuple(processes))
