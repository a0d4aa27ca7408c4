"""What of the CUDA path only a card can decide: `benchmark gpu-sweep` measures both sides."""

import os
from dataclasses import dataclass, fields

CHOICES_VARIABLE = "ABDOSEG_CUDA"
"""Environment variable with choices that differ from the defaults: `overlap=0,dense_borders=0`."""


@dataclass(frozen=True)
class CudaChoices:
    """How a network is run on CUDA; labels do not depend on it, but for rounding.

    Attributes:
        fused_kernels: bias, ReLU and sum within cuDNN's convolution, where it has such a kernel.
        dense_borders: logits are interpolated everywhere, not only along the labels' borders, for
            which the host would have to wait.
        overlap: a batch is launched before the labels of the one before it are fetched.
        pinned_buffers: voxels and labels cross through memory that the device copies from itself.
        expandable_segments: torch's allocator grows its blocks instead of adding others.
        folds_meanwhile: the network is folded while the device is made ready.
        ends_context: the device's memory is given back, context and all, with the last label.
    """

    fused_kernels: bool = True
    dense_borders: bool = True
    overlap: bool = True
    pinned_buffers: bool = True
    expandable_segments: bool = True
    folds_meanwhile: bool = True
    ends_context: bool = True

    @classmethod
    def from_environment(cls) -> "CudaChoices":
        """The defaults, changed as `CHOICES_VARIABLE` says.

        Raises:
            ValueError: it says what is no choice.
        """
        changes = {}
        names = [field.name for field in fields(cls)]
        for part in filter(None, os.environ.get(CHOICES_VARIABLE, "").split(",")):
            name, _, value = part.partition("=")
            if name not in names or value not in ("0", "1"):
                raise ValueError(f"{CHOICES_VARIABLE}: {part}: say NAME=0 or NAME=1, of {names}")
            changes[name] = value == "1"
        return cls(**changes)
