"""A CT series as the service segments it: its name, its grid, its volume."""

from dataclasses import dataclass, field
from functools import cached_property

import nibabel
import numpy as np

from inference.dicom.geometry import Stack, stack
from inference.dicom.pixels import THREADS, read_pixels, value_type
from inference.dicom.slices import Slice
from inference.volume import Admit, Volume, VolumeError, flipped, orientation


@dataclass(eq=False)
class Series:
    """A CT series, or one acquisition of it.

    Attributes:
        name: of its case; tells nothing of the patient.
        uid: of the series.
        slices: as found, in no order.
        refusal: why it cannot be read, or "".
        part: the number of the acquisition that it is, where its series holds several volumes.
        notes: what is odd about it and costs nothing.
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
    def pixel_bytes(self) -> int:
        """Of all slices, as if they were not compressed."""
        return sum(one.rows * one.columns * one.bits // 8 for one in self.slices)

    @cached_property
    def stack(self) -> Stack:
        """The slices in order.

        Raises:
            VolumeError: they make no grid.
        """
        if self.refusal:
            raise VolumeError(self.refusal)
        made = stack(self.slices)
        if made.tilt:
            self.notes.append(
                f"its slices lean by {made.tilt:.1f} degrees (a tilted gantry): the label map's "
                "affine is sheared, which some viewers refuse; none is bent or resampled"
            )
        return made

    @cached_property
    def header(self) -> nibabel.Nifti1Header:
        """The NIfTI header of its grid, and of the label map's.

        Raises:
            VolumeError: it has none.
        """
        return self.stack.header(value_type(self.stack.slices)[0])

    def read(self, admit: Admit | None = None) -> Volume:
        """Read the series; its axes are turned to SPL as those of a NIfTI file.

        Args:
            admit: called with the header and the bytes of files that are held at once; raises to
                refuse it.

        Raises:
            VolumeError: the slices make no volume, or their pixels cannot be read.
        """
        ordered, header = self.stack.slices, self.header
        axes, flips = orientation(header.get_best_affine())
        dtype, in_hu = value_type(ordered)
        if admit:
            held = max(one.rows * one.columns * one.bits // 8 for one in ordered)
            held *= 1 + max(one.frame for one in ordered)  # a file of many slices is read whole
            admit(header, 2 * held * min(THREADS, len({one.file for one in ordered})))
        voxels = read_pixels(ordered, dtype, in_hu=in_hu)
        one = ordered[0]
        return Volume(
            voxels=flipped(voxels.transpose(2, 1, 0).transpose(axes), flips),
            slope=1.0 if in_hu else one.slope,
            intercept=0.0 if in_hu else one.intercept,
            spacing=tuple(float(self.stack.spacing[axis]) for axis in axes),
            header=header,
            disk_axes=axes,
            disk_flips=flips,
        )


def slices_of_label_map(label_map: np.ndarray, volume: Volume) -> np.ndarray:
    """A label map in the order of the series' slices: (slices, rows, columns)."""
    return (
        flipped(label_map, volume.disk_flips)
        .transpose(np.argsort(volume.disk_axes))
        .transpose(2, 1, 0)
    )
