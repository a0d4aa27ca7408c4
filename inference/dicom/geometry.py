"""Order slices of CT by position and compute their grid, or report why they make none.

A slice may lie 0.1 mm, and 1 % of the spacing, off the grid. A gantry tilt gives a sheared affine;
nothing is resampled.
"""

from collections import Counter
from dataclasses import dataclass

import nibabel
import numpy as np

from ..volume import VolumeError
from .slices import Slice

_TOLERANCE_MM, _TOLERANCE_STEPS = 0.1, 0.01  # positions are stored rounded
_COSINE = 5e-4  # by which orientations may differ: 0.1 mm at 250 mm
_MAX_TILT = 45.0  # degrees; gantries tilt by up to 30
_MIN_TILT = 0.05  # degrees; less is rounding
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Stack:
    """Slices in order, and their grid.

    Attributes:
        slices: along the normal of their planes (right-handed: columns, rows, slices).
        affine: 4x4, indices of column, row and slice to RAS+, mm.
        tilt: degrees between the line through the slices and the normal of their planes.
    """

    slices: tuple[Slice, ...]
    affine: np.ndarray
    tilt: float

    def header(self, dtype: np.dtype) -> nibabel.Nifti1Header:
        """Return a NIfTI header of the grid; without a qform, which has no shear, if it is tilted.

        Raises:
            VolumeError: NIfTI cannot hold the grid.
        """
        header = nibabel.Nifti1Header()
        shape = (self.slices[0].columns, self.slices[0].rows, len(self.slices))
        if max(shape) > np.iinfo(np.int16).max:
            raise VolumeError(f"NIfTI cannot hold its shape, {'x'.join(map(str, shape))}")
        header.set_data_shape(shape)
        header.set_data_dtype(dtype)
        header.set_zooms(np.linalg.norm(self.affine[:3, :3], axis=0))
        header.set_xyzt_units("mm", "sec")
        header.set_sform(self.affine, 1)
        if not self.tilt:
            header.set_qform(self.affine, 1)
        return header


def stack(slices: list[Slice]) -> Stack:
    """Order the slices of one series.

    Raises:
        VolumeError: they make no grid; the message is the reason.
    """
    _check_alike("Columns/Rows", np.array([(one.columns, one.rows) for one in slices]))
    axes = np.array([one.orientation for one in slices])
    _check_alike("ImageOrientationPatient", axes, _COSINE)
    pixel_mm = np.array([one.pixel_mm for one in slices])
    if pixel_mm.min() <= 0:
        raise VolumeError("PixelSpacing is not more than 0")
    _check_alike("PixelSpacing", pixel_mm, _COSINE * pixel_mm[0].min())
    axes = axes[0].reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > 1e-3 or abs(axes[0] @ axes[1]) > 1e-3:
        raise VolumeError("ImageOrientationPatient is not two unit vectors at a right angle")
    along_row, along_column = axes / lengths[:, None]
    normal = np.cross(along_row, along_column)
    normal /= np.linalg.norm(normal)

    ordered, step = _in_order(slices, normal)
    tilt = float(np.degrees(np.arccos(min(1.0, step @ normal / np.linalg.norm(step)))))
    if tilt > _MAX_TILT:
        raise VolumeError(f"its slices are stacked at {tilt:.0f} degrees to their normal")
    row_mm, column_mm = slices[0].pixel_mm  # between rows, and between columns
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_mm
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = step
    affine[:3, 3] = ordered[0].position
    return Stack(
        slices=tuple(ordered),
        affine=_LPS_TO_RAS @ affine,
        tilt=tilt if tilt >= _MIN_TILT else 0.0,
    )


def _check_alike(name: str, values: np.ndarray, tolerance: float = 0.0) -> None:
    """Refuse slices, a row of values each, that differ by more than a tolerance."""
    if np.abs(values - values[0]).max() > tolerance:
        counts = Counter("/".join(f"{value:.4g}" for value in row) for row in values)
        shown = ", ".join(f"{row} in {count}" for row, count in counts.most_common(3))
        raise VolumeError(f"its slices differ in {name}: {len(counts)} values, {shown}")


def _in_order(slices: list[Slice], normal: np.ndarray) -> tuple[list[Slice], np.ndarray]:
    """Return the slices sorted along their normal, and the step from each to the next, LPS, mm.

    Raises:
        VolumeError: two are at one place, some are missing, or they are unevenly spaced.
    """
    positions = np.array([one.position for one in slices])
    order = np.argsort(positions @ normal, kind="stable")
    ordered, positions = [slices[place] for place in order], positions[order]
    if len(ordered) == 1:
        if ordered[0].step_mm is None:
            raise VolumeError("it is one slice without SpacingBetweenSlices or SliceThickness")
        return ordered, normal * ordered[0].step_mm
    step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    off = positions - positions[0] - np.arange(len(ordered))[:, None] * step
    tolerance = _TOLERANCE_MM + _TOLERANCE_STEPS * float(step @ normal)
    if 2 * tolerance > step @ normal or np.abs(off @ normal).max() > tolerance:
        raise VolumeError(_why_uneven(ordered, np.diff(positions @ normal)))
    if (furthest := np.linalg.norm(off, axis=1).max()) > tolerance:
        raise VolumeError(f"its slices do not lie in a line: one is {furthest:.1f} mm off")
    return ordered, step


def _why_uneven(ordered: list[Slice], steps: np.ndarray) -> str:
    """Return what is wrong with slices that are so many mm apart."""
    typical = float(np.median(steps))
    doubled = np.flatnonzero(steps < max(0.01, 0.02 * typical))
    if doubled.size:
        one, other = ordered[doubled[0]], ordered[doubled[0] + 1]
        return (
            f"{doubled.size} of its slices lie where another does ({one.label} and {other.label}); "
            f"acquisitions: {len({one.acquisition for one in ordered})}"
        )
    missing = np.rint(steps / typical).astype(int) - 1
    tolerance = 2 * (_TOLERANCE_MM + _TOLERANCE_STEPS * typical)
    if missing.sum() > 0 and (np.abs(steps - (missing + 1) * typical) <= tolerance).all():
        gap = int(np.argmax(missing > 0))
        return (
            f"{missing.sum()} of its slices are missing: {steps[gap]:.2f} mm between "
            f"{ordered[gap].label} and {ordered[gap + 1].label}, {typical:.2f} mm elsewhere"
        )
    return f"its slices are {steps.min():.2f} to {steps.max():.2f} mm apart"
