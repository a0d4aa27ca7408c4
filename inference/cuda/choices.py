"""Choices of the CUDA path that only a measurement can decide; `benchmark gpu-sweep` makes it."""

import os
from dataclasses import dataclass, fields

CHOICES_VARIABLE = "ABDOSEG_CUDA"
"""Environment variable that changes choices: `overlap=0,dense_borders=0`."""


@dataclass(frozen=True)
class CudaChoices:
    """How a network runs on CUDA; labels do not depend on it, except for rounding.

    Attributes:
        fused_kernels: use cuDNN's convolutions with bias, sum and ReLU, where it has them.
        dense_borders: interpolate all logits instead of those along label borders, for which the
            host would have to wait.
        overlap: launch a batch before fetching the labels of the previous one.
        pinned_buffers: copy voxels and labels through pinned memory.
        expandable_segments: let torch's allocator grow its blocks instead of adding more.
        folds_meanwhile: fold the network while the device is initialised.
        ends_context: destroy the CUDA context after the last label.
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
        """Return the defaults with the changes in `CHOICES_VARIABLE`.

        Raises:
            ValueError: it names an unknown choice or value.
        """
        changes = {}
        names = [field.name for field in fields(cls)]
        for part in filter(None, os.environ.get(CHOICES_VARIABLE, "").split(",")):
            name, _, value = part.partition("=")
            if name not in names or value not in ("0", "1"):
                raise ValueError(f"{CHOICES_VARIABLE}: {part}: use NAME=0 or NAME=1, of {names}")
            changes[name] = value == "1"
        return cls(**changes)
