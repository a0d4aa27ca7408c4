"""The NVIDIA driver itself, without torch: begun while torch is imported, ended before the process.

The calls are those of the CUDA driver API (`cuda.h`), whose functions return 0 where all went well.
"""

import ctypes
import threading
from functools import cache

_SUCCESS = 0


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows, (13, 0) say; None where there is no driver."""
    library, number = _library(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)) != _SUCCESS:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _device(library: ctypes.CDLL, index: int) -> ctypes.c_int | None:
    device = ctypes.c_int()
    return device if library.cuDeviceGet(ctypes.byref(device), index) == _SUCCESS else None


def begin(index: int, *, with_context: bool) -> threading.Thread | None:
    """Begin to initialise the driver in a thread; torch finds it ready, or waits for it.

    The driver is free while torch is being imported, which takes longer. No memory of the device
    is taken but by the context.

    Args:
        index: of the device, as torch counts.
        with_context: make the device's primary context too, which torch will use.

    Returns:
        The thread; None where there is no driver. What goes wrong there, torch meets again.
    """
    library = _library()
    if library is None:
        return None

    def initialise() -> None:
        if library.cuInit(0) != _SUCCESS or not with_context:
            return
        if (device := _device(library, index)) is not None:
            library.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), device)

    thread = threading.Thread(target=initialise, name="driver", daemon=True)
    thread.start()
    return thread


def end_context(index: int) -> None:
    """Destroy a device's primary context and give all its memory back.

    Nothing of this process can use the device afterwards. What the process would do at its end
    happens before the last label map is written.

    Args:
        index: of the device, as torch counts.
    """
    library = _library()
    if library is not None and (device := _device(library, index)) is not None:
        library.cuDevicePrimaryCtxReset_v2(device)
