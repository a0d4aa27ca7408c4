"""Prediction: the slices of a volume through the network in batches, labels back.

Voxels go to the device as the file has them and are normalised there; the logits are reduced to
one byte a voxel there, and only those labels come back. No volume of logits is ever built.
"""

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from inference.folding import fold
from inference.intensity import normalise
from inference.memory import LIVE_WIDTHS, slice_bytes
from inference.model import DOWNSAMPLING, AttentionUNet
from inference.weights import WeightsMetadata

# What the process takes on the device before the first slice: the CUDA context and its kernels.
# An allowance, not a measurement: the true figure depends on card and driver.
_CUDA_CONTEXT_MB = 500

# Slices of a batch on CUDA unless asked otherwise, however much memory there is: so many keep any
# card busy, and what more of them take only adds to the area under the memory curve.
_LARGEST_BATCH = 32

# On a CPU so many slices at most are predicted at once, so that their maps fit in memory however
# many cores there are.
_MOST_LANES = 16

# With less memory for maps wide convolutions keep to their own weights: those that Winograd's
# algorithm maps are 300 MB more for the full-size network.
_WINOGRAD_HOST_BYTES = 1 << 30

# Types that torch can compute with; others are widened on the host.
_DEVICE_DTYPES = {np.dtype(name) for name in ("uint8", "int8", "int16", "int32", "float32")}


def choose_device(requested: str) -> torch.device:
    """The device to run on: `auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        ValueError: a CUDA device was asked for that is not there.
    """
    if requested == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(requested)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no CUDA device {requested}: torch sees {torch.cuda.device_count()}")
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """Half precision where the device is faster with it.

    fp16 on CUDA. On a CPU bfloat16 if it has AMX tiles (measured on a Xeon with AMX: 2.2 times
    faster than fp32 at base_channels 8, 3.8 times at 64; with AVX-512 alone slower), else fp32.
    """
    if device.type == "cuda":
        return torch.float16
    cpuinfo = Path("/proc/cpuinfo")
    has_amx = cpuinfo.exists() and " amx_bf16" in cpuinfo.read_text()
    return torch.bfloat16 if has_amx else torch.float32


def _reuse_freed_memory() -> None:
    """Let malloc keep what is freed, for every map of the network is as large as one before it.

    By default glibc maps large blocks anew and gives them back each time, and the kernel clears
    every page again: 12 to 20 % of the network's time (benchmark/results/waterfall-cpu.md). Blocks
    of 256 MB and more, whole volumes, are still given back. Other C libraries have no such options.
    """
    if not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
    libc.mallopt(mmap_threshold, 256 << 20)
    libc.mallopt(trim_threshold, 1 << 30)
    libc.mallopt(arena_max, 1)  # what one thread has freed serves the others


class Predictor:
    """A network on a device, ready to label volumes.

    Args:
        state_dict: of `AttentionUNet`; fp16 or fp32.
        metadata: that came with it.
        device: CUDA or CPU.
        batch_size: slices a batch; by default what fits `gpu_memory_mb` on CUDA, at most 32; 1 on a
            CPU (where larger batches are slower: their maps leave the cache).
        lanes: batches at once, each in a thread that shares the cores with the others; by default
            1 on CUDA, as many as cores on a CPU (at most 16), whose threads then seldom wait for
            one another.
        gpu_memory_mb: device memory for the whole process, in MB, kept to by torch's allocator; by
            default what is free.
        host_bytes: on a CPU, for the maps of the slices that are predicted at once: where it is too
            little for all lanes, slices are predicted one at a time. By default there is no limit.
        dtype: by default `choose_dtype(device)`.
    """

    def __init__(
        self,
        state_dict: dict[str, Tensor],
        metadata: WeightsMetadata,
        device: torch.device,
        *,
        batch_size: int | None = None,
        lanes: int | None = None,
        gpu_memory_mb: float | None = None,
        host_bytes: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.metadata = metadata
        self.device = device
        self.dtype = dtype or choose_dtype(device)
        self.batch_size = batch_size
        self.host_bytes = host_bytes

        with torch.device("meta"):
            network = AttentionUNet(
                metadata.num_classes, metadata.base_channels, metadata.attention
            )
        in_fp32 = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in state_dict.items()
        }
        try:
            network.load_state_dict(in_fp32, assign=True)
        except RuntimeError as error:
            raise ValueError("the weights are not those of the network their file names") from error
        roomy = host_bytes is None or host_bytes >= _WINOGRAD_HOST_BYTES
        winograd = device.type == "cpu" and self.dtype == torch.float32 and roomy
        network = fold(network, winograd=winograd)
        self.network = network.to(device, self.dtype, memory_format=torch.channels_last)
        if device.type == "cuda":
            free, total = (size / 2**20 for size in torch.cuda.mem_get_info(device))
            wanted = free if gpu_memory_mb is None else gpu_memory_mb - _CUDA_CONTEXT_MB
            self.memory_mb = min(max(wanted, 0.0), free)
            torch.cuda.set_per_process_memory_fraction(self.memory_mb / total, device)
        else:
            _reuse_freed_memory()
        threads = torch.get_num_threads()
        self.lanes = lanes or (1 if device.type == "cuda" else min(threads, _MOST_LANES))
        self._pool = ThreadPoolExecutor(
            self.lanes,
            initializer=torch.set_num_threads,
            initargs=(max(1, threads // self.lanes),),
        )

    def predict(
        self,
        voxels: np.ndarray,
        *,
        window: tuple[float, float],
        slope: float = 1.0,
        intercept: float = 0.0,
        reduction: int | None = None,
        on_slices: Callable[[int], None] = lambda count: None,
    ) -> np.ndarray:
        """Label every voxel of a volume.

        Args:
            voxels: (slices, rows, columns), SPL, as the file has them, any real type.
            window: the volume's 1st and 99th percentile, in the units of `voxels`.
            slope, intercept: HU = slope * voxel + intercept.
            reduction: the matrix reduction; by default the weights' own
                (`WeightsMetadata.reduction_at` lowers it where pixels are coarse).
            on_slices: called after each batch with the number of slices in it.

        Returns:
            The label map, (slices, rows, columns), uint8, C-contiguous, before components.

        Raises:
            torch.OutOfMemoryError: not even one slice fits the device's memory.
        """
        label_map = np.empty(voxels.shape, np.uint8)
        reduction = reduction or self.metadata.matrix_reduction
        batch_size = self.batch_size or self.default_batch_size(voxels.shape[1:], reduction)

        def label(start: int, stop: int) -> None:
            batch = voxels[start:stop]
            labels = self._predict_batch(batch, window, slope, intercept, reduction)
            label_map[start:stop] = labels.cpu().numpy()

        if self.lanes > 1 and self._lanes_fit(batch_size, voxels.shape[1:], reduction):
            starts = range(0, len(voxels), batch_size)
            stops = [min(start + batch_size, len(voxels)) for start in starts]
            done = self._pool.map(label, starts, stops)
            for start, stop, _ in zip(starts, stops, done, strict=True):
                on_slices(stop - start)
            return label_map

        start = 0
        while start < len(voxels):
            stop = min(start + batch_size, len(voxels))
            try:
                label(start, stop)
            except torch.OutOfMemoryError:
                if stop - start == 1:
                    raise
                batch_size = (stop - start) // 2
                self.batch_size = batch_size  # later volumes need not find it out again
                torch.cuda.empty_cache()
                continue
            on_slices(stop - start)
            start = stop
        return label_map

    @torch.inference_mode()
    def _predict_batch(
        self,
        voxels: np.ndarray,
        window: tuple[float, float],
        slope: float,
        intercept: float,
        reduction: int,
    ) -> Tensor:
        """Labels (slices, rows, columns), uint8, on the device."""
        slices = torch.from_numpy(_for_device(voxels)).to(self.device)[:, None]
        slices = normalise(
            slices,
            window=window,
            slope=slope,
            intercept=intercept,
            mean=self.metadata.intensity_mean,
            std=self.metadata.intensity_std,
        )
        rows, columns = voxels.shape[1:]
        multiple = DOWNSAMPLING * reduction
        # The edge's own values go on, so that the padding is no edge to the network.
        slices = functional.pad(
            slices, (0, -columns % multiple, 0, -rows % multiple), mode="replicate"
        )
        if reduction > 1:
            slices = functional.avg_pool2d(slices, reduction)
        slices = slices.to(self.dtype, memory_format=torch.channels_last)
        logits = self.network(slices)
        logits = logits.permute(0, 2, 3, 1)
        labels = _labels(logits) if reduction == 1 else _upsampled_labels(logits, reduction)
        return labels[:, :rows, :columns]

    def _lanes_fit(self, batch_size: int, size: tuple[int, int], reduction: int) -> bool:
        if self.host_bytes is None:
            return True
        channels, value_bytes = self.metadata.base_channels, self.dtype.itemsize
        one = slice_bytes(math.prod(size), channels, reduction, value_bytes)
        return self.lanes * batch_size * one <= self.host_bytes

    def release(self) -> None:
        """Give the device's memory back, but for the context; nothing can be predicted after."""
        del self.network
        self._pool.shutdown()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def default_batch_size(self, size: tuple[int, int], reduction: int) -> int:
        """The default batch size for slices of this size (rows, columns), reduced so."""
        if self.device.type == "cpu":
            return 1
        bytes_per_pixel = 2 * self.metadata.base_channels * LIVE_WIDTHS / reduction**2
        slice_mb = size[0] * size[1] * bytes_per_pixel / 2**20
        weights_mb = sum(weight.nbytes for weight in self.network.parameters()) / 2**20
        return min(max(1, int((self.memory_mb - weights_mb) / slice_mb)), _LARGEST_BATCH)


def _labels(logits: Tensor) -> Tensor:
    """The class of the largest logit: (..., classes) to (...), uint8."""
    if logits.device.type == "cpu":  # numpy is nearly 3 times as fast along so short an axis
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1).astype(np.uint8))
    return logits.argmax(dim=-1).to(torch.uint8)


def _upsampled_labels(logits: Tensor, factor: int) -> Tensor:
    """The labels of bilinearly upsampled logits, without building those.

    Where the four pixels between which a pixel is interpolated have the same largest logit, so has
    it. Only in the cells along the labels' borders are logits interpolated.

    Args:
        logits: (N, H, W, classes).
        factor: even, as for `interpolate(scale_factor=factor, align_corners=False)`.

    Returns:
        (N, factor * H, factor * W), uint8.
    """
    # Each cell has a pixel at each corner; of those around the border half lies outside, where the
    # edge's own values go on.
    rows, columns = (
        torch.arange(-1, length + 1, device=logits.device).clamp_(0, length - 1)
        for length in logits.shape[1:3]
    )
    labels = _labels(logits)[:, rows][:, :, columns]
    corner = labels[:, :-1, :-1]
    others = (labels[:, :-1, 1:], labels[:, 1:, :-1], labels[:, 1:, 1:])
    mixed = (corner != others[0]) | (corner != others[1]) | (corner != others[2])
    n, row, column = mixed.nonzero(as_tuple=True)

    distance = (torch.arange(factor, device=logits.device) + 0.5) / factor
    shares = (1 - distance, distance)
    interpolated = sum(
        torch.kron(shares[below], shares[right])[:, None]
        * logits[n, rows[row + below], columns[column + right]].float()[:, None]
        for below in range(2)
        for right in range(2)
    )  # (cells, pixels of a cell, classes); no matrix product, for which CUDA would load cuBLAS
    cells = corner[..., None].repeat(1, 1, 1, factor**2)
    cells[n, row, column] = _labels(interpolated)

    cells = cells.unflatten(3, (factor, factor)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    inside = slice(factor // 2, -(factor // 2))
    return cells[:, inside, inside]


def _for_device(voxels: np.ndarray) -> np.ndarray:
    """The voxels contiguous, in this machine's byte order and a type that torch computes with."""
    dtype = voxels.dtype.newbyteorder("=")
    if dtype == np.uint16:
        dtype = np.dtype(np.int32)
    elif dtype not in _DEVICE_DTYPES:
        dtype = np.dtype(np.float32)
    # A copy in any case: torch takes neither read-only nor reversed arrays.
    return np.array(voxels, dtype, order="C")
