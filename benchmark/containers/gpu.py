"""The GPU that is measured: which one, and its memory as NVML reads it."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pynvml
from pynvml import NVMLError

from benchmark.options import HarnessError, UsageError
from benchmark.text import log

BYTES_PER_MB = 2**20
_NO_DRIVER = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

_LOST = (
    *(pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED),
    *(pynvml.NVML_ERROR_TIMEOUT, pynvml.NVML_ERROR_IRQ_ISSUE),
)

_IDLE_SAMPLES = 10
_BUSY_MB = 256.0  # idle memory beside the driver's own, above which the GPU is taken to be in use


class GpuUnavailable(HarnessError):
    """There is no such GPU; one line says why."""


class GpuLost(GpuUnavailable):
    """A GPU that is there no longer answers."""


class Gpu:
    """One NVIDIA GPU.

    Attributes:
        device: what `docker --gpus device=` and CUDA_VISIBLE_DEVICES name it by: NVML's number, or
            the UUID of a MIG instance.
        name, driver, total_mb: of the GPU, of its driver and of its memory; None where unknown.
        unread: why its memory cannot be read, which leaves it out of the figures; None if it can.
    """

    def __init__(self, device: int | str) -> None:
        """Open a GPU by NVML's number or by (the start of) its UUID.

        Raises:
            GpuUnavailable: there is no driver or no such GPU.
            GpuLost: it no longer answers.
        """
        self.device = str(device)
        self.name: str | None = f"GPU {device}"
        self.driver: str | None = None
        self.total_mb: float | None = None
        self.unread: str | None = None
        self._tells_reserved = True
        try:
            pynvml.nvmlInit()
            self._handle = self._find()
            self.driver = _answer(pynvml.nvmlSystemGetDriverVersion)
            self.name = _answer(pynvml.nvmlDeviceGetName, self._handle) or self.name
            self.total_mb = self._memory_info().total / BYTES_PER_MB
        except NVMLError as error:
            self.unread = str(error)
            if error.value in _NO_DRIVER:
                raise GpuUnavailable(f"no NVIDIA driver on this machine ({error})") from error
            if error.value in _LOST:
                raise GpuLost(f"GPU {self.device} no longer answers ({error})") from error

    def _find(self) -> Any:  # noqa: ANN401
        if self.device.startswith("MIG-"):
            return pynvml.nvmlDeviceGetHandleByUUID(self.device)
        found = pynvml.nvmlDeviceGetCount()
        if found == 0:
            raise GpuUnavailable("NVML finds no device on this machine")
        for number in range(found) if self.device.startswith("GPU-") else ():
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            if pynvml.nvmlDeviceGetUUID(handle).startswith(self.device):
                self.device = str(number)
        if not self.device.isdecimal() or int(self.device) >= found:
            raise GpuUnavailable(f"no GPU {self.device}: NVML finds {found}, numbered from 0")
        return pynvml.nvmlDeviceGetHandleByIndex(int(self.device))

    def _memory_info(self) -> pynvml.c_nvmlMemory_t | pynvml.c_nvmlMemory_v2_t:
        if self._tells_reserved:
            with suppress(NVMLError):  # old drivers, new boards, WSL, MIG: the first call may do
                return pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2)
            self._tells_reserved = False
        return pynvml.nvmlDeviceGetMemoryInfo(self._handle)

    def memory_mb(self) -> tuple[float, float | None]:
        """Return total − free of the GPU (the challenge's measure), and the driver's own part.

        Raises:
            pynvml.NVMLError: it no longer answers.
        """
        info = self._memory_info()
        reserved = info.reserved / BYTES_PER_MB if self._tells_reserved else None
        return (info.total - info.free) / BYTES_PER_MB, reserved

    def processes_mb(self) -> dict[int, float] | None:
        """Return the memory of each compute process by its id; None if the driver hides it."""
        processes = _answer(pynvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        if processes is None or any(process.usedGpuMemory is None for process in processes):
            return None
        return {process.pid: process.usedGpuMemory / BYTES_PER_MB for process in processes}

    def close(self) -> None:
        """Leave NVML."""
        _answer(pynvml.nvmlShutdown)


def _answer(question: Callable, *arguments: object) -> Any:  # noqa: ANN401
    with suppress(NVMLError):
        return question(*arguments)


@contextmanager
def gpu_of(wanted: int | None) -> Iterator[tuple[Gpu | None, str | None]]:
    """Open the GPU to measure for a while; see `open_gpu`."""
    gpu, note = open_gpu(wanted)
    try:
        yield gpu, note
    finally:
        if gpu:
            gpu.close()


def open_gpu(wanted: int | None) -> tuple[Gpu | None, str | None]:
    """Open the GPU to measure, and warn where there is none or it cannot be read.

    Args:
        wanted: `--gpu`; None takes the first of CUDA_VISIBLE_DEVICES, or else 0.

    Returns:
        The GPU, which containers get even if its memory cannot be read, or None; and why the
        columns of GPU memory are empty, or None.

    Raises:
        UsageError: a wanted GPU is not there or cannot be read.
        GpuLost: a GPU is there and no longer answers.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "").split(",")[0].strip()
    device = first or "0" if wanted is None else str(wanted)
    if wanted is not None and visible is not None and first != device:
        log(f"warning: GPU {device} is used, as --gpu says, not CUDA_VISIBLE_DEVICES={visible}")
    gpu, note = None, None
    try:
        if wanted is None and visible is not None and first in ("", "-1"):
            raise GpuUnavailable(f"CUDA_VISIBLE_DEVICES={visible} hides every GPU")
        gpu = Gpu(device)
        if gpu.unread:
            note = f"the memory of GPU {gpu.device} cannot be read ({gpu.unread})"
    except GpuLost:
        raise
    except GpuUnavailable as error:
        note = f"{error}; containers get none"
    if note and wanted is not None:
        raise UsageError(f"--gpu {wanted}: {note}")
    if note:
        log(f"GPU columns stay empty: {note}")
    return gpu, note


class Idle(NamedTuple):
    """The GPU before the first case: its mean total − free, and its compute processes' ids."""

    gpu_mb: float | None = None
    processes: tuple[int, ...] = ()


NOT_READ = Idle()


def read_idle(gpu: Gpu | None, interval: float) -> Idle:
    """Sample the GPU before the first case, and warn where it is in use.

    Raises:
        GpuLost: it no longer answers.
    """
    if gpu is None or gpu.unread:
        return NOT_READ
    readings = []
    try:
        for _ in range(_IDLE_SAMPLES):
            readings.append(gpu.memory_mb())
            time.sleep(interval)
    except NVMLError as error:
        raise GpuLost(f"GPU {gpu.device} no longer answers ({error})") from error
    idle_mb = statistics.fmean(used for used, _ in readings)
    processes = gpu.processes_mb() or {}
    if processes or idle_mb - (readings[-1][1] or 0.0) > _BUSY_MB:
        ids = f" (processes {', '.join(map(str, processes))})" if processes else ""
        log(
            f"warning: GPU {gpu.device} is in use before the first case: {idle_mb:,.0f} MB{ids}, "
            "which the official area counts in every sample"
        )
    return Idle(idle_mb, tuple(processes))
