"""A CUDA device: made ready, its memory shared out, its errors told in one line."""

import contextlib
import math
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.nn import functional

from inference.driver import cuda_version
from inference.weights import WeightsMetadata

CONTEXT_MB = 500
"""What the process takes on the device beside torch's allocator: the CUDA context and its kernels.
An allowance, not a measurement: the true figure depends on card and driver."""

LARGEST_BATCH = 32
"""Slices of a batch unless asked otherwise, however much memory there is: so many keep any card
busy, and what more of them take only adds to the area under the memory curve."""

_OUT_OF_MEMORY = re.compile(
    r"out of memory|unable to find an engine|(CUDNN|CUBLAS)_STATUS_ALLOC_FAILED", re.IGNORECASE
)

# Of the folded network of base_channels 64, for a slice of 512x512 (`network-speed --sweep` counts
# the operations; the bytes are those of its convolutions' inputs and outputs, in half precision).
_FULL_GFLOP, _FULL_MB, _FULL_CHANNELS, _FULL_PIXELS = 462.1, 800.0, 64, 512 * 512

# Part of the operations, and about of the bytes, that grows with the supervised maps' channels.
_SUPERVISED = 0.06

# What a batch costs the host, which launches some 150 kernels: the device is not done sooner.
_LAUNCH_SECONDS = 0.0025

# Half-precision operations a clock of one multiprocessor's matrix units, by compute capability.
_OPERATIONS = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096}
_SHARE_REACHED = 0.4  # of the rates of a device's data sheet, by what networks like this one reach


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
def told_in_one_line(device: torch.device) -> Iterator[None]:
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


def begin(device: torch.device, dtype: torch.dtype) -> "Future[bool]":
    """Make a device ready in a thread: context, cuDNN and its first plan.

    Returns:
        Whether its fused kernels can be trusted (`_first_convolutions`).
    """
    thread = ThreadPoolExecutor(1)
    begun = thread.submit(_first_convolutions, device, dtype)
    thread.shutdown(wait=False)
    return begun


@torch.inference_mode()
def _first_convolutions(device: torch.device, dtype: torch.dtype) -> bool:
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


def slice_seconds(
    metadata: WeightsMetadata, pixels: int, properties: "torch._C._CudaDeviceProperties"
) -> float:
    """What a slice costs a device at least, estimated from its data sheet.

    Args:
        metadata: of the network.
        pixels: that it sees of a slice.
        properties: of the device.
    """
    width, part = metadata.base_channels / _FULL_CHANNELS, pixels / _FULL_PIXELS
    supervised = 4 * metadata.supervised_channels / metadata.base_channels or 1
    more = 1 + _SUPERVISED * (supervised - 1)
    capability = (properties.major, properties.minor)
    # One that is not known does what the nearest before it does.
    nearest = max((known for known in _OPERATIONS if known <= capability), default=(7, 0))
    # A driver that tells no clock: one of about the middle.
    clock = 1e3 * (properties.clock_rate or 1_500_000)
    rate = properties.multi_processor_count * clock * _OPERATIONS[nearest]
    computing = _FULL_GFLOP * 1e9 * width**2 * more * part / rate
    # Two transfers a clock; the clock in kHz, the bus in bits.
    memory_clock = 1e3 * (properties.memory_clock_rate or 7_000_000)
    bandwidth = 2 * memory_clock * (properties.memory_bus_width or 256) / 8
    moving = _FULL_MB * 2**20 * width * more * part / bandwidth
    return max(computing, moving) / _SHARE_REACHED


def best_batch(slice_mb: float, held_mb: float, seconds: float, most: int) -> int:
    """The batch size with the least area under the memory curve, by a model.

    While the network runs, `held_mb + batch * slice_mb` are reserved. A batch takes as long as its
    slices take the device, but no less than its launches take the host: up to there more slices
    cost no time, and beyond only memory.

    Args:
        slice_mb: of one slice's maps.
        held_mb: of context and weights.
        seconds: that a slice takes the device.
        most: that fit.
    """
    return min(
        range(1, most + 1),
        key=lambda batch: (
            (held_mb + batch * slice_mb) * max(_LAUNCH_SECONDS, batch * seconds) / batch
        ),
    )
