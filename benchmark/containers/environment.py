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
        gpu: the GPU that containers get.
        gpu_note: why its memory is not measured, or why there is none.

    Returns:
        `gpu`, `gpu_memory_mb` and `driver` (None without one), `gpu_note`, `cpu`, `cores`
        (logical), `memory_gb` (2**30 bytes), `system`, `versions` and `date` (ISO 8601, UTC).
    """
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "gpu": gpu.name if gpu else None,
        "gpu_memory_mb": gpu.total_mb if gpu else None,
        "driver": gpu.driver if gpu else None,
        "gpu_note": gpu_note,
        "cpu": named[0] if named else platform.machine(),  # Arm kernels name no model
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in _PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
