"""Voxels to the device and labels back."""

import numpy as np
import torch
from torch import Tensor

# Types that torch can compute with; others are widened on the host.
_DEVICE_DTYPES = {
    np.dtype(name): getattr(torch, name) for name in ("uint8", "int8", "int16", "int32", "float32")
}


def to_device(voxels: np.ndarray, device: torch.device, *, pinned: bool) -> Tensor:
    """A copy on a device: contiguous, in this machine's byte order and a type of torch's.

    Args:
        voxels: of any real type, in any order.
        device: where to.
        pinned: through memory from which a CUDA device copies by itself: the host goes on.
    """
    dtype = voxels.dtype.newbyteorder("=")
    if dtype == np.uint16:
        dtype = np.dtype(np.int32)
    elif dtype not in _DEVICE_DTYPES:
        dtype = np.dtype(np.float32)
    if pinned:
        copy = torch.empty(voxels.shape, dtype=_DEVICE_DTYPES[dtype], pin_memory=True)
        copy.numpy()[...] = voxels
        return copy.to(device, non_blocking=True)
    # A copy in any case: torch takes neither read-only nor reversed arrays.
    return torch.from_numpy(np.array(voxels, dtype, order="C")).to(device)


class LabelsUnderWay:
    """The labels of a batch, on their way to the host.

    Args:
        start, stop: their slices.
        labels: (stop - start, rows, columns), uint8, on the device, where they may not be computed
            yet.
        pinned: copy them at once into memory that a CUDA device writes to by itself. Else they are
            copied when they are fetched, after all that has been launched by then.
    """

    def __init__(self, start: int, stop: int, labels: Tensor, *, pinned: bool) -> None:
        self.start, self.stop = start, stop
        self._labels, self._copied = labels, None
        if pinned:
            self._labels = torch.empty(labels.shape, dtype=labels.dtype, pin_memory=True)
            self._labels.copy_(labels, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(labels.device))

    def fetch(self) -> np.ndarray:
        """Wait for them: (stop - start, rows, columns), uint8."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._labels.cpu().numpy()
