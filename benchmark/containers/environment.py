"""The machine that a measurement was made on, for the report beside the numbers."""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path

import psutil

from benchmark.containers.gpu import Gpu

_PACKAGES = ("numpy", "nibabel", "nvidia-ml-py", "psutil", "matplotlib")


def describe_machine(gpu: Gpu | None, gpu_note: str | None) -> dict:
    """Name the hardware and software of this machine.

    Args:
        gpu: the measured device.
        gpu_note: why there is none.

    Returns:
        `gpu`, `gpu_memory_mb` and `driver` (None without a device), `gpu_note`, `cpu`, `cores`
        (logical), `memory_gb` (2**30 bytes), `system`, `versions` and `date` (ISO 8601, UTC).
    """
    return {
        "gpu": gpu.name if gpu else None,
        "gpu_memory_mb": gpu.total_mb if gpu else None,
        "driver": gpu.driver if gpu else None,
        "gpu_note": gpu_note,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in _PACKAGES},
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()  # Arm kernels name no model
