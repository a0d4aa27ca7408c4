"""The machine that measures: its GPU, whose memory NVML reads, its hardware and versions."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pynvml
from pynvml import NVMLError

from benchmark.options import HarnessError
from benchmark.text import log

BYTES_PER_MB = 2**20

INTERVAL = 0.1
"""Seconds between samples, the organisers', and the width by which their sums become areas."""

_NO_DRIVER = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
_LOST = (
    *(pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED),
    *(pynvml.NVML_ERROR_TIMEOUT, pynvml.NVML_ERROR_IRQ_ISSUE),
)
_IDLE_SAMPLES = 10
_BUSY_MB = 256.0  # idle memory beside the driver's own, above which the GPU is taken to be in use
_PACKAGES = ("numpy", "nibabel", "nvidia-ml-py", "psutil", "matplotlib")


class GpuLost(HarnessError):
    """A GPU that is there no longer answers."""


class Gpu:
    """One NVIDIA GPU, or none.

    Attributes:
        device: what `docker --gpus device=` and CUDA_VISIBLE_DEVICES name it by, NVML's number or
            the UUID of a MIG instance; None without a GPU.
        name, driver, total_mb: of the GPU, of its driver and of its memory; None where unknown.
        note: why its memory cannot be read; None if it can.
        idle_mb: its mean total − free before the first case; None before `read_idle`.
        idle_processes: ids of the compute processes that it had then.
    """

    def __init__(self, device: str | None, note: str | None = None) -> None:
        """Open a GPU by NVML's number or (the start of) its UUID; None is no GPU.

        Raises:
            GpuLost: it no longer answers.
        """
        self.device, self.note = device, note
        self.name: str | None = None
        self.driver: str | None = None
        self.total_mb: float | None = None
        self.idle_mb: float | None = None
        self.idle_processes: tuple[int, ...] = ()
        self._reports_reserved = True
        if device is None:
            return
        try:
            pynvml.nvmlInit()
            self._handle = self._find(device)
            self.name = f"GPU {self.device}"
            self.driver = _answer(pynvml.nvmlSystemGetDriverVersion)
            self.name = _answer(pynvml.nvmlDeviceGetName, self._handle) or self.name
            self.total_mb = self._memory_info().total / BYTES_PER_MB
        except LookupError as error:
            self.device, self.note = None, f"{error.args[0]}; containers get none"
        except NVMLError as error:
            if error.value in _LOST:
                raise GpuLost(f"GPU {device} no longer answers ({error})") from error
            self.name = self.name or f"GPU {device}"
            self.note = f"the memory of GPU {device} cannot be read ({error})"
            if error.value in _NO_DRIVER:
                self.device = self.name = None
                self.note = f"no NVIDIA driver on this machine ({error}); containers get none"

    def _find(self, device: str) -> Any:  # noqa: ANN401
        if device.startswith("MIG-"):
            return pynvml.nvmlDeviceGetHandleByUUID(device)
        count = pynvml.nvmlDeviceGetCount()
        for number in range(count):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            if device == str(number) or (
                device.startswith("GPU-") and pynvml.nvmlDeviceGetUUID(handle).startswith(device)
            ):
                self.device = str(number)
                return handle
        raise LookupError(f"no GPU {device}: NVML finds {count}, numbered from 0")

    def _memory_info(self) -> pynvml.c_nvmlMemory_t | pynvml.c_nvmlMemory_v2_t:
        if self._reports_reserved:
            with suppress(NVMLError):  # old drivers, new boards, WSL, MIG: the first call may do
                return pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2)
            self._reports_reserved = False
        return pynvml.nvmlDeviceGetMemoryInfo(self._handle)

    def memory_mb(self) -> tuple[float, float | None]:
        """Return total − free of the GPU (the challenge's measure), and the driver's own part.

        Raises:
            pynvml.NVMLError: it no longer answers.
        """
        info = self._memory_info()
        reserved = info.reserved / BYTES_PER_MB if self._reports_reserved else None
        return (info.total - info.free) / BYTES_PER_MB, reserved

    def processes_mb(self) -> dict[int, float] | None:
        """Return the memory of each compute process by its id; None if the driver hides it."""
        processes = _answer(pynvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        if processes is None or any(process.usedGpuMemory is None for process in processes):
            return None
        return {process.pid: process.usedGpuMemory / BYTES_PER_MB for process in processes}

    def read_idle(self) -> None:
        """Set `idle_mb` and `idle_processes` before the first case, and warn if it is in use.

        Raises:
            GpuLost: it no longer answers.
        """
        if self.note:
            return
        readings = []
        try:
            for _ in range(_IDLE_SAMPLES):
                readings.append(self.memory_mb())
                time.sleep(INTERVAL)
        except NVMLError as error:
            raise GpuLost(f"GPU {self.device} no longer answers ({error})") from error
        self.idle_mb = statistics.fmean(used for used, _ in readings)
        self.idle_processes = tuple(self.processes_mb() or ())
        if self.idle_processes or self.idle_mb - (readings[-1][1] or 0.0) > _BUSY_MB:
            ids = ", ".join(map(str, self.idle_processes)) or "unknown"
            log(
                f"warning: GPU {self.device} is in use before the first case: {self.idle_mb:,.0f} "
                f"MB (processes: {ids}), which the official area counts in every sample"
            )


NO_GPU = Gpu(None, "no GPU was asked for")


def _answer(question: Callable, *arguments: object) -> Any:  # noqa: ANN401
    with suppress(NVMLError):
        return question(*arguments)
    return None


@contextmanager
def open_gpu(wanted: int | None) -> Iterator[Gpu]:
    """Open the GPU to measure for a block, and warn where there is none or it cannot be read.

    Args:
        wanted: `--gpu`; None takes the first of CUDA_VISIBLE_DEVICES, or else 0.

    Raises:
        HarnessError: a wanted GPU is not there or cannot be read.
        GpuLost: a GPU is there and no longer answers.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "").split(",")[0].strip()
    device = (first or "0") if wanted is None else str(wanted)
    if wanted is not None and visible is not None and first != device:
        log(f"warning: GPU {device} is used, as --gpu asks, not CUDA_VISIBLE_DEVICES={visible}")
    if wanted is None and visible is not None and first in ("", "-1"):
        gpu = Gpu(None, f"CUDA_VISIBLE_DEVICES={visible} hides every GPU; containers get none")
    else:
        gpu = Gpu(device)
    if gpu.note and wanted is not None:
        raise HarnessError(f"--gpu {wanted}: {gpu.note}")
    if gpu.note:
        log(f"GPU columns stay empty: {gpu.note}")
    try:
        yield gpu
    finally:
        _answer(pynvml.nvmlShutdown)


def describe_machine(gpu: Gpu | None = None) -> dict[str, Any]:
    """Return the hardware and software of this machine.

    Returns:
        `gpu`, `gpu_memory_mb` and `driver` (None without one), `gpu_note` (why its memory is not
        read), `cpu`, `cores` (logical), `memory_gb` (2**30 bytes), `system`, `versions` and `date`
        (ISO 8601, UTC).
    """
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "gpu": gpu and gpu.name,
        "gpu_memory_mb": gpu and gpu.total_mb,
        "driver": gpu and gpu.driver,
        "gpu_note": gpu and gpu.note,
        "cpu": named[0] if named else platform.machine(),  # Arm kernels name no model
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in _PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
