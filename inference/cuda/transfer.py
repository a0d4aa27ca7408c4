"""Copy voxels to the device and labels back."""

import numpy as np
import torch
from torch import Tensor

# Types that torch computes with; others are converted on the host.
_DEVICE_DTYPES = {
    np.dtype(name): getattr(torch, name) for name in ("uint8", "int8", "int16", "int32", "float32")
}


def to_device(voxels: np.ndarray, device: torch.device, *, pinned: bool) -> Tensor:
    """Copy voxels to a device: contiguous, in native byte order, in a type that torch has.

    Args:
        voxels: of any real type, byte order and strides.
        device: the target.
        pinned: copy through pinned memory, so that the host does not wait for the device.
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
    # Always a copy: torch accepts neither read-only arrays nor negative strides.
    return torch.from_numpy(np.array(voxels, dtype, order="C")).to(device)


class PendingLabels:
    """The labels of a batch, which the device may still be computing or copying.

    Args:
        start, stop: their slices.
        labels: (stop - start, rows, columns), uint8, on the device.
        pinned: start the copy to pinned host memory now. Otherwise `fetch` copies, and waits for
            everything launched until then.
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
        """Wait for the labels and return them: (stop - start, rows, columns), uint8."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._labels.cpu().numpy()
