"""An NVIDIA device and its memory, as NVML sees them."""

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
