"""A CUDA device: made ready, its memory shared out, its errors told in one line."""

import contextlib
import math
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.nn import functional

from inference.driver import cuda_version

CONTEXT_MB = 500
"""What the process takes on the device beside torch's allocator: the CUDA context and its kernels.
An allowance, not a measurement: the true figure depends on card and driver."""

BATCH_SIZES = {1: 4, 2: 16, 4: 32}
"""Slices of a batch by matrix reduction, where so many fit the memory allowed. Not measured: chosen
so that a batch has about the pixels of four 512x512 slices at each reduction."""

_OUT_OF_MEMORY = re.compile(
    r"out of memory|unable to find an engine|(CUDNN|CUBLAS)_STATUS_ALLOC_FAILED", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: not every library says it by `torch.OutOfMemoryError`."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


def why_no_device() -> str:
    """Why torch sees no CUDA device, and what to do."""
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


@contextlib.contextmanager
def as_value_error(device: torch.device) -> Iterator[None]:
    """Turn what goes wrong while a device is made ready into a `ValueError` with what to do."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_out_of_memory(error):
            reason = (
                "its memory is full: end what else runs on it, or name another device with --device"
            )
        elif "no kernel image" in str(error) or "not compatible" in str(error):
            reason = (
                f"this torch (CUDA {torch.version.cuda}) has no kernels for it: build the image "
                "with another TORCH_INDEX, or run with --device cpu"
            )
        elif "driver" in str(error):
            reason = f"{first} ({why_no_device()})"
        else:
            reason = f"{first}; --device cpu runs without it"
        raise ValueError(f"{device} cannot be used: {reason}") from error


def warm_up(device: torch.device, dtype: torch.dtype) -> "Future[bool]":
    """Make a device ready in a thread: context, cuDNN and its first plan.

    Returns:
        Whether its fused kernels can be trusted (`_warm_up_and_check_fused_kernels`).
    """
    thread = ThreadPoolExecutor(1)
    begun = thread.submit(_warm_up_and_check_fused_kernels, device, dtype)
    thread.shutdown(wait=False)
    return begun


@torch.inference_mode()
def _warm_up_and_check_fused_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Convolve something tiny, by which everything that is loaded once is loaded.

    Returns:
        Whether cuDNN's fused kernels yield what they should. Each is given memory that held NaN,
        which one that reads its result before it has written it would hand on.
    """
    torch.cuda.set_device(device)
    options = {"device": device, "dtype": dtype}
    features = torch.ones(1, 8, 4, 4, **options).contiguous(memory_format=torch.channels_last)
    weight = torch.full((8, 8, 3, 3), 0.125, **options).contiguous(
        memory_format=torch.channels_last
    )
    bias = torch.full((8,), -5.0, **options)
    geometry = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups
    functional.conv2d(features, weight, bias, padding=1)
    # 9 pixels are under the kernel, 6 along an edge, 4 in a corner.
    sums = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]])
    try:
        torch.full_like(features, math.nan)  # freed at once: the next of its size is in its place
        relu = torch.cudnn_convolution_relu(features, weight, bias, *geometry)
        torch.full_like(features, math.nan)
        total = torch.cudnn_convolution_add_relu(features, weight, features, 1.0, bias, *geometry)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError):  # of a device, a type or a version of torch without
        return False
    return all(
        (result.float().cpu() == (sums + constant).clamp(min=0)).all()
        for result, constant in ((relu, -5), (total, -4))
    )
