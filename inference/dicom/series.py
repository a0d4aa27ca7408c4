"""A CT series as the service segments it: its name, its grid, its volume."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import nibabel

from ..volume import Admit, OnContent, Volume, VolumeError, header_grid, volume_on
from .geometry import Stack, stack
from .pixels import THREADS, read_pixels, value_type
from .slices import Slice


@dataclass(eq=False)
class Series:
    """A CT series, or one acquisition of it.

    Attributes:
        name: of its case; does not identify the patient.
        uid: of the series.
        slices: as found, in no order.
        refusal: why it cannot be read, or "".
        part: the number of the acquisition that it is, where its series holds several volumes.
        notes: what a user should know of it.
    """

    name: str
    uid: str
    slices: list[Slice] = field(default_factory=list)
    refusal: str = ""
    part: str = ""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"series {self.name}"

    @property
    def files(self) -> set[Path]:
        """Return the files, or archives, that it is read from."""
        return {one.file.path for one in self.slices}

    @property
    def byte_count(self) -> int:
        """Return the bytes of all slices, not compressed."""
        return sum(one.byte_count for one in self.slices)

    @cached_property
    def stack(self) -> Stack:
        """Return the slices in order.

        Raises:
            VolumeError: they make no grid.
        """
        if self.refusal:
            raise VolumeError(self.refusal)
        made = stack(self.slices)
        if made.tilt:
            self.notes.append(f"gantry tilt {made.tilt:.1f}°: sheared affine, not resampled")
        return made

    @cached_property
    def header(self) -> nibabel.Nifti1Header:
        """Return the NIfTI header of its grid, and of the label map's.

        Raises:
            VolumeError: it has none.
        """
        return self.stack.header(value_type(self.stack.slices))

    def read(self, admit: Admit | None = None, on_content: OnContent | None = None) -> Volume:
        """Read the series; its axes are turned to SPL as those of a NIfTI file.

        Args:
            admit: called with the header and the bytes of files in memory at once; raises to
                refuse it.
            on_content: not called: its bytes are those of many files.

        Raises:
            VolumeError: the slices make no volume, or their pixels cannot be read.
        """
        ordered, header = self.stack.slices, self.header
        grid = header_grid(header)
        if admit:  # a file of many slices is read whole
            largest = max(one.byte_count for one in ordered) * (
                1 + max(one.frame for one in ordered)
            )
            admit(header, 2 * largest * min(THREADS, len({one.file for one in ordered})))
        voxels = read_pixels(ordered)
        in_hu = voxels.dtype.kind == "f"
        return volume_on(
            replace(grid, notes=tuple(self.notes)),
            voxels.transpose(2, 1, 0),
            1.0 if in_hu else ordered[0].slope,
            0.0 if in_hu else ordered[0].intercept,
            header,
        )
