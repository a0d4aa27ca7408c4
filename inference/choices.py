"""What of the CUDA path only a card can decide: `benchmark gpu-sweep` measures both sides."""

import os
from dataclasses import dataclass, fields

CHOICES_VARIABLE = "ABDOSEG_CUDA"
"""Environment variable with choices that differ from the defaults: `overlap=0,padded_head=1`."""


@dataclass(frozen=True)
class CudaChoices:
    """How a network is run on CUDA; labels do not depend on it, but for rounding.

    Attributes:
        area_batch: the batch size that makes the least area under the memory curve by
            `cuda.best_batch`, not the largest that fits.
        fused_kernels: bias, ReLU and sum within cuDNN's convolution, where it has such a kernel.
        padded_head: the head computes 16 channels, the last of which nobody reads.
        dense_borders: logits are interpolated everywhere, not only along the labels' borders, for
            which the host would have to wait.
        overlap: a batch is launched before the labels of the one before it are fetched.
        pinned_buffers: voxels and labels cross through memory that the device copies from itself.
        expandable_segments: torch's allocator grows its blocks instead of adding others.
        early_context: the device's context is made while torch is being imported. Sooner there, but
            what it takes is then held for all of the import.
        folds_meanwhile: the network is folded while the device is made ready.
        ends_context: the device's memory is given back, context and all, with the last label.
    """

    area_batch: bool = True
    fused_kernels: bool = True
    padded_head: bool = False
    dense_borders: bool = True
    overlap: bool = True
    pinned_buffers: bool = True
    expandable_segments: bool = True
    early_context: bool = False
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
