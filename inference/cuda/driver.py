"""The NVIDIA driver's own API (`cuda.h`), called without torch.

Its functions return 0 on success.
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
    """Return the newest CUDA version that the driver supports, or None without a driver."""
    library, number = _library(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)) != _SUCCESS:
        return None
    return number.value // 1000, number.value % 1000 // 10


def initialise() -> threading.Thread | None:
    """Initialise the driver in a thread, so that it is done while torch is imported.

    No device memory is taken: torch makes the context later.

    Returns:
        The thread, or None without a driver. An error is ignored: torch gets the same one.
    """
    library = _library()
    if library is None:
        return None
    thread = threading.Thread(target=library.cuInit, args=(0,), name="driver", daemon=True)
    thread.start()
    return thread
