"""Initialise a CUDA device, copy to it and from it, and explain its errors."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .driver import cuda_version

CONTEXT_MB = 500
"""Device memory of the CUDA context and its kernels, which torch's allocator does not count. An
assumption: the true figure depends on the card and the driver."""

BATCH_SIZES = {1: 4, 2: 16, 4: 32}
"""Slices in a batch by matrix reduction, unless fewer fit the memory. An assumption: a batch has
about the pixels of four slices of 512x512 at each reduction."""

_OUT_OF_MEMORY = re.compile(
    r"out of memory|unable to find an engine|(CUDNN|CUBLAS)_STATUS_ALLOC_FAILED", re.IGNORECASE
)


_DTYPES = {
    np.dtype(name): getattr(torch, name) for name in ("uint8", "int8", "int16", "int32", "float32")
}
"""Types that torch computes with; others are converted on the host."""


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an error means too little device memory; libraries raise it in several ways."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


def why_no_device() -> str:
    """Return why torch sees no CUDA device, and what to do."""
    wanted, known = torch.version.cuda, cuda_version()
    if wanted is None:
        return "this torch is built without CUDA"
    if known is None:
        return "there is no NVIDIA driver (a container needs `docker run --gpus`)"
    if known[0] < int(wanted.split(".")[0]):
        return (
            f"the NVIDIA driver is for CUDA {known[0]}.{known[1]} and torch for {wanted}: update "
            "the driver, or build the image with another TORCH_INDEX"
        )
    return "the NVIDIA driver shows none (CUDA_VISIBLE_DEVICES, or `docker run --gpus`)"


class DeviceError(ValueError):
    """A device that is there and cannot be used; the message is one line with what to do."""


@contextlib.contextmanager
def as_value_error(device: torch.device) -> Iterator[None]:
    """Raise errors of a device's initialisation as a `DeviceError`."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_out_of_memory(error):
            reason = "its memory is full: end other processes on it, or choose another --device"
        elif "no kernel image" in str(error) or "not compatible" in str(error):
            reason = (
                f"this torch (CUDA {torch.version.cuda}) has no kernels for it: build the image "
                "with another TORCH_INDEX, or run with --device cpu"
            )
        elif "driver" in str(error):
            reason = f"{first} ({why_no_device()})"
        else:
            reason = f"{first}; --device cpu runs without it"
        raise DeviceError(f"{device} cannot be used: {reason}") from error


def warm_up(device: torch.device, dtype: torch.dtype) -> "Future[bool]":
    """Run `_warm_up_and_check_fused_kernels` in a thread."""
    thread = ThreadPoolExecutor(1)
    checked = thread.submit(_warm_up_and_check_fused_kernels, device, dtype)
    thread.shutdown(wait=False)
    return checked


@torch.inference_mode()
def _warm_up_and_check_fused_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Make the context and load cuDNN by small convolutions.

    Returns:
        Whether cuDNN's fused kernels exist and are correct. Their outputs are allocated where NaN
        was, so that a kernel which reads its output before writing it fails.
    """
    torch.cuda.set_device(device)
    ones = torch.ones(1, 8, 4, 4, device=device, dtype=dtype)
    features = ones.contiguous(memory_format=torch.channels_last)
    weight = (ones[:, :, :3, :3] / 8).expand(8, -1, -1, -1)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = -5 * ones[0, :, 0, 0]
    geometry = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups
    functional.conv2d(features, weight, bias, padding=1)
    # 9 pixels are under the kernel, 6 along an edge, 4 in a corner.
    sums = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]])
    try:
        torch.full_like(features, math.nan)  # freed at once; the next output takes its memory
        relu = torch.cudnn_convolution_relu(features, weight, bias, *geometry)
        torch.full_like(features, math.nan)
        total = torch.cudnn_convolution_add_relu(features, weight, features, 1.0, bias, *geometry)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError):  # this device, type or torch version has none
        return False
    return all(
        (result.float().cpu() == (sums + constant).clamp(min=0)).all()
        for result, constant in ((relu, -5), (total, -4))
    )


def to_device(voxels: np.ndarray, device: torch.device) -> Tensor:
    """Copy voxels to a device: contiguous, in native byte order, in a type that torch has.

    To CUDA they go through pinned memory, so that the host does not wait for the device.

    Args:
        voxels: of any real type, byte order and strides.
        device: CUDA or CPU.
    """
    dtype = voxels.dtype.newbyteorder("=")
    if dtype == np.uint16:
        dtype = np.dtype(np.int32)
    elif dtype not in _DTYPES:
        dtype = np.dtype(np.float32)
    # Always a copy: torch accepts neither read-only arrays nor negative strides.
    copy = torch.empty(voxels.shape, dtype=_DTYPES[dtype], pin_memory=device.type == "cuda")
    copy.numpy()[...] = voxels
    return copy.to(device, non_blocking=True)


def start_download(labels: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy labels from CUDA to pinned memory; return what waits for it and returns them.

    Args:
        labels: (slices, rows, columns), uint8, which the device may still be computing.
    """
    copy = torch.empty(labels.shape, dtype=labels.dtype, pin_memory=True)
    copy.copy_(labels, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(labels.device))

    def fetch() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return fetch
