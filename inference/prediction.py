"""Prediction: the slices of a volume through the network in batches, labels back.

Voxels go to the device as the file has them and are normalised there; the logits are reduced to
one byte a voxel there, and only those labels come back. No volume of logits is ever built.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .cuda import runtime as cuda
from .device import choose_dtype, thread_count
from .intensity import clipped_window, normalise
from .network.averaging import AveragedNetworks
from .network.folding import fold
from .network.fusion import fuse_on_cuda
from .network.labelling import interpolated_labels, labels_of, upsampled_labels
from .network.model import DOWNSAMPLING, AttentionUNet
from .network.weights import WeightsMetadata, common_metadata

_MOST_LANES = 16  # on a CPU, however many cores there are: the maps of so many slices need memory


def trained_network(state_dict: dict[str, Tensor], metadata: WeightsMetadata) -> AttentionUNet:
    """Return the network of a weights file, fp32.

    Raises:
        ValueError: the weights do not fit the network that the metadata describe.
    """
    with torch.device("meta"):
        network = AttentionUNet(**metadata.network)
    try:
        network.load_state_dict(state_dict, assign=True)
    except RuntimeError as error:
        raise ValueError("the weights are not those of the network their file names") from error
    return network.float()


class Predictor:
    """A network on a device, ready to label volumes.

    Args:
        weights: state dict of an `AttentionUNet`, fp16 or fp32, and its metadata; of several
            networks the probabilities are averaged. On CUDA they are read while the device is
            being initialised.
        device: CUDA or CPU.
        batch_size: slices a batch; by default `cuda.BATCH_SIZES` on CUDA, or fewer where they do
            not fit; 1 on a CPU (where larger batches are slower: their maps leave the cache).
        lanes: batches at once, each in a thread that shares the cores with the others; by default
            1 on CUDA, as many as `thread_count` on a CPU (at most 16), whose threads then seldom
            wait for one another.
        gpu_memory_mb: device memory for the whole process, in MB, kept to by torch's allocator; by
            default what is free.
        dtype: by default `choose_dtype(device)`.
        fused_kernels: use cuDNN's convolutions with bias, sum and ReLU, where it has them.
        dense_borders: interpolate all logits on CUDA, not only those along label borders, for which
            the host would have to wait.

    Raises:
        ValueError: the weights are of another network, or of some that do not see the same slices;
            `gpu_memory_mb` is too little for it, or the device cannot be used.
    """

    def __init__(
        self,
        weights: Iterable[tuple[dict[str, Tensor], WeightsMetadata]],
        device: torch.device,
        *,
        batch_size: int | None = None,
        lanes: int | None = None,
        gpu_memory_mb: float | None = None,
        dtype: torch.dtype | None = None,
        fused_kernels: bool = True,
        dense_borders: bool = True,
    ) -> None:
        self.device = device
        self.dtype = dtype or choose_dtype(device)
        self.batch_size = batch_size
        on_cuda = device.type == "cuda"
        self._dense_borders = dense_borders and on_cuda
        # By size and reduction of the slices, after a lack of memory.
        self._batch_sizes: dict[tuple[int, int, int], int] = {}

        ready = cuda.warm_up(device, self.dtype) if on_cuda else None
        weights = list(weights)
        each = [metadata for _, metadata in weights]
        self.metadata = common_metadata(each)
        folded = [fold(trained_network(*one)) for one in weights]
        network = folded[0] if len(folded) == 1 else AveragedNetworks(folded, each)
        if ready is None:
            self.network = self._moved(network)
        else:
            with cuda.as_value_error(device):
                # What cuDNN has no fused kernel for is found out layer by layer; what it computes
                # wrongly in one it should in none.
                if ready.result() and fused_kernels:
                    fuse_on_cuda(network)
                torch.cuda.set_device(device)
                self.network = self._moved(network)
                self.memory_mb = self._limited_memory_mb(gpu_memory_mb)
        threads = thread_count()
        self.lanes = lanes or (1 if on_cuda else min(threads, _MOST_LANES))
        self._pool = ThreadPoolExecutor(
            self.lanes,
            initializer=torch.set_num_threads,
            initargs=(max(1, threads // self.lanes),),
        )

    def _moved(self, network: nn.Module) -> nn.Module:
        channels_last: dict[str, Any] = {"memory_format": torch.channels_last}
        return network.to(self.device, self.dtype, **channels_last)

    def _limited_memory_mb(self, most_mb: float | None) -> float:
        """Limit torch's allocator, and return the MB that weights and maps may take."""
        weights_mb = self._weights_mb()
        least = weights_mb + self._slice_mb((512, 512), self.metadata.matrix_reduction)
        free, total = (size / 2**20 for size in torch.cuda.mem_get_info(self.device))
        memory_mb = weights_mb + free
        if most_mb is not None:
            if most_mb - cuda.CONTEXT_MB < least:
                raise ValueError(
                    f"{most_mb:g} MB of GPU memory are too little: this network needs at least "
                    f"{math.ceil(least) + cuda.CONTEXT_MB} (--gpu-memory), of which the CUDA "
                    f"context takes some {cuda.CONTEXT_MB}"
                )
            memory_mb = min(most_mb - cuda.CONTEXT_MB, memory_mb)
            fraction = min(1.0, memory_mb / total)
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)
        if memory_mb < least:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {free:.0f} MB are free")
        return memory_mb

    def predict(
        self,
        voxels: np.ndarray,
        *,
        window: tuple[float, float],
        slope: float = 1.0,
        intercept: float = 0.0,
        reduction: int | None = None,
        lanes: int | None = None,
        on_slices: Callable[[int], None] = lambda count: None,
    ) -> np.ndarray:
        """Label every voxel of a volume.

        Args:
            voxels: (slices, rows, columns), SPL, as the file has them, any real type.
            window: the volume's 1st and 99th percentile, in the units of `voxels`.
            slope, intercept: HU = slope * voxel + intercept.
            reduction: the matrix reduction (`WeightsMetadata.reduction_at`); default: the weights'.
            lanes: all, as by default, or 1, where memory is short.
            on_slices: called after each batch with the number of slices in it.

        Returns:
            The label map, (slices, rows, columns), uint8, C-contiguous, before components.

        Raises:
            torch.OutOfMemoryError: not even one slice fits the device's memory.
        """
        window = clipped_window(window, self.metadata.clip_hu, slope, intercept)
        reduction = reduction or self.metadata.matrix_reduction

        def label(first: int, stop: int) -> Tensor:
            slices = cuda.to_device(voxels[first:stop], self.device)
            return self._predict_batch(slices, window, slope, intercept, reduction)

        if self.device.type == "cuda":
            batches = self._predict_on_cuda(label, voxels.shape, reduction)
        else:
            batches = self._predict_on_cpu(label, len(voxels), lanes or self.lanes)
        label_map = np.empty(voxels.shape, np.uint8)
        for start, labels in batches:
            label_map[start : start + len(labels)] = labels
            on_slices(len(labels))
        return label_map

    def _predict_on_cpu(
        self, label: Callable[[int, int], Tensor], count: int, lanes: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first slice and the labels of each batch, `lanes` of them predicted at once."""
        starts = range(0, count, self.batch_size or 1)
        stops = [*starts[1:], count]
        run = map if lanes == 1 else self._pool.map
        for start, labels in zip(starts, run(label, starts, stops), strict=True):
            yield start, labels.numpy()

    def _predict_on_cuda(
        self, label: Callable[[int, int], Tensor], shape: tuple[int, ...], reduction: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield as `_predict_on_cpu`, one batch launched ahead; one that does not fit is halved."""
        # The current device is a thread's own: without it pinned memory would make a context on
        # device 0 as well.
        torch.cuda.set_device(self.device)
        count, rows, columns = shape
        size = (rows, columns, reduction)
        batch_size = self._batch_sizes.get(size) or self.batch_size
        batch_size = batch_size or self.default_batch_size((rows, columns), reduction)
        launched: tuple[int, Callable[[], np.ndarray]] | None = None
        start = 0
        while start < count:
            stop = min(start + batch_size, count)
            # cuDNN would plan anew for a last batch of another size: it takes some slices again.
            first = max(0, stop - batch_size)
            try:
                fetch = cuda.start_download(label(first, stop)[start - stop :])
            except RuntimeError as error:
                if stop - first == 1 or not cuda.is_out_of_memory(error):
                    raise
            else:
                if launched:
                    yield launched[0], launched[1]()
                launched, start = (start, fetch), stop
                continue
            # Not before the error is gone, whose traceback holds the batch.
            if stop - first == batch_size:  # a volume of fewer slices shows nothing of others
                self._batch_sizes[size] = batch_size // 2
            batch_size = (stop - first) // 2
            torch.cuda.empty_cache()
        if launched:
            yield launched[0], launched[1]()

    @torch.inference_mode()
    def _predict_batch(
        self,
        voxels: Tensor,
        window: tuple[float, float],
        slope: float,
        intercept: float,
        reduction: int,
    ) -> Tensor:
        """Return labels (slices, rows, columns), uint8, of such voxels, both on the device."""
        mean, std = self.metadata.intensity_mean, self.metadata.intensity_std
        slices = normalise(
            voxels[:, None], window=window, slope=slope, intercept=intercept, mean=mean, std=std
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
        logits = self.network(slices).permute(0, 2, 3, 1)
        if reduction == 1:
            labels = labels_of(logits)
        elif self._dense_borders:
            labels = interpolated_labels(logits, reduction)
        else:
            labels = upsampled_labels(logits, reduction)
        return labels[:, :rows, :columns]

    def host_bytes(self, size: tuple[int, int], reduction: int) -> int:
        """Return the bytes of this machine's memory that a lane takes for slices of a size."""
        if self.device.type == "cuda":
            return 0
        one = self.metadata.slice_bytes(math.prod(size), reduction, self.dtype.itemsize)
        return one * (self.batch_size or 1)

    def release(self) -> None:
        """Give the device's memory back; nothing can be predicted after."""
        del self.network
        self._pool.shutdown()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _weights_mb(self) -> float:
        return sum(weight.nbytes for weight in self.network.parameters()) / 2**20

    def _slice_mb(self, size: tuple[int, int], reduction: int) -> float:
        return self.metadata.slice_bytes(math.prod(size), reduction, 2) / 2**20

    def default_batch_size(self, size: tuple[int, int], reduction: int) -> int:
        """Return the default batch size for slices of this size (rows, columns), reduced so."""
        if self.device.type == "cpu":
            return 1
        fitting = int((self.memory_mb - self._weights_mb()) / self._slice_mb(size, reduction))
        return max(1, min(fitting, cuda.BATCH_SIZES[reduction]))
