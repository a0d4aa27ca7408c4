"""Slices put in order by where they lie in the patient: a grid, or the reason why there is none.

`highdicom` sorts the positions and judges whether they are evenly spaced. On top of that this
module says why not, keeps the slices in a line to a tenth of a millimetre (highdicom lets them
wander off by 2.5 degrees), and lets the line lean, as a tilted gantry does: the affine is sheared
then, and nothing is resampled.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import nibabel
import numpy as np

from inference.dicom.slices import Slice
from inference.volume import VolumeError

_STRAY_MM, _STRAY_STEPS = 0.1, 0.01
"""How far a slice may lie from its place on the grid: positions are stored rounded."""

_COSINE = 5e-4  # by which orientations of one series may differ: 0.1 mm at 250 mm
_MOST_TILT = 45.0  # degrees; gantries tilt by 30
_LEAST_TILT = 0.05  # degrees; less is rounding

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Stack:
    """Slices in order, and the grid that they make.

    Attributes:
        slices: along the normal of their planes (right-handed: columns, rows, slices).
        affine: 4x4, indices of column, row and slice to RAS+, mm.
        spacing: mm between columns, between rows, and between the slices' planes.
        tilt: degrees between the line of the slices and the normal of their planes.
    """

    slices: tuple[Slice, ...]
    affine: np.ndarray
    spacing: tuple[float, float, float]
    tilt: float

    def header(self, dtype: np.dtype) -> nibabel.Nifti1Header:
        """A NIfTI header of the grid; a sheared one has no qform, which cannot say it.

        Raises:
            VolumeError: NIfTI cannot hold the grid.
        """
        header = nibabel.Nifti1Header()
        shape = (self.slices[0].columns, self.slices[0].rows, len(self.slices))
        if max(shape) > np.iinfo(np.int16).max:
            raise VolumeError(f"NIfTI cannot hold its shape, {'x'.join(map(str, shape))}")
        header.set_data_shape(shape)
        header.set_data_dtype(dtype)
        header.set_zooms([float(np.linalg.norm(self.affine[:3, axis])) for axis in range(3)])
        header.set_xyzt_units("mm", "sec")
        header.set_sform(self.affine, 1)
        if self.tilt < _LEAST_TILT:
            header.set_qform(self.affine, 1)
        return header


def stack(slices: list[Slice]) -> Stack:
    """Put the slices of one series in order.

    Raises:
        VolumeError: they make no grid; the message says why.
    """
    _insist_on_one(slices, "size", lambda one: f"{one.columns}x{one.rows}")
    first = slices[0]
    orientations = np.array([one.orientation for one in slices])
    if np.abs(orientations - orientations[0]).max() > _COSINE:
        _insist_on_one(
            slices, "orientation", lambda one: "/".join(f"{n:.2g}" for n in one.orientation)
        )
        raise VolumeError("its slices differ in orientation")
    pixels = np.array([one.pixel_mm for one in slices])
    if pixels.min() <= 0:
        raise VolumeError("its pixel spacing is not more than 0")
    if np.abs(pixels / pixels[0] - 1).max() > _COSINE:
        _insist_on_one(slices, "pixel spacing", lambda one: f"{one.pixel_mm[0]:.4g} mm")
        raise VolumeError("its slices differ in pixel spacing")
    along_row, along_column = orientations[0].reshape(2, 3)
    lengths = np.linalg.norm(orientations[0].reshape(2, 3), axis=1)
    if np.abs(lengths - 1).max() > 1e-3 or abs(along_row @ along_column) > 1e-3:
        raise VolumeError("its orientation is not two unit vectors at a right angle")
    along_row, along_column = along_row / lengths[0], along_column / lengths[1]
    normal = np.cross(along_row, along_column)
    normal /= np.linalg.norm(normal)

    ordered = _in_order(slices, normal)
    if len(ordered) == 1:
        if first.step_mm is None:
            raise VolumeError("it is one slice and says neither its thickness nor its spacing")
        step = normal * first.step_mm
    else:
        positions = np.array([one.position for one in ordered])
        step = (positions[-1] - positions[0]) / (len(ordered) - 1)
        grid = positions[0] + np.arange(len(ordered))[:, None] * step
        stray = np.linalg.norm(positions - grid, axis=1).max()
        if stray > _allowed_stray(float(step @ normal)):
            raise VolumeError(f"its slices do not lie in a line: one is {stray:.1f} mm off")
    distance = float(step @ normal)
    tilt = float(np.degrees(np.arccos(min(1.0, distance / np.linalg.norm(step)))))
    if tilt > _MOST_TILT:
        raise VolumeError(f"its slices are stacked at {tilt:.0f} degrees to their planes")
    row_mm, column_mm = first.pixel_mm  # between rows, and between columns
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_mm
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = step
    affine[:3, 3] = ordered[0].position
    return Stack(
        slices=tuple(ordered),
        affine=_LPS_TO_RAS @ affine,
        spacing=(column_mm, row_mm, distance),
        tilt=tilt if tilt >= _LEAST_TILT else 0.0,
    )


def _insist_on_one(slices: list[Slice], what: str, value: Callable[[Slice], str]) -> None:
    counts = Counter(map(value, slices))
    if len(counts) > 1:
        shown = ", ".join(f"{count} of {name}" for name, count in counts.most_common(3))
        more = f" and {len(counts) - 3} more" if len(counts) > 3 else ""
        raise VolumeError(f"its slices differ in {what}: {shown}{more}")


def _allowed_stray(step: float) -> float:
    return _STRAY_MM + _STRAY_STEPS * abs(step)


def _in_order(slices: list[Slice], normal: np.ndarray) -> list[Slice]:
    """The slices sorted by place along the normal.

    Raises:
        VolumeError: two are at one place, some are missing, or they are unevenly spaced.
    """
    if len(slices) == 1:
        return slices
    from highdicom.spatial import get_volume_positions

    distances = np.array([one.position for one in slices]) @ normal
    mean = float(np.ptp(distances)) / (len(slices) - 1)
    spacing, places = get_volume_positions(
        [one.position for one in slices],
        slices[0].orientation,
        atol=2 * _allowed_stray(mean),
        index_convention="RD",  # columns, rows, slices: right-handed
        perpendicular_tol=1.0,  # a tilted gantry: how far is checked above
    )
    if spacing is None or 2 * _allowed_stray(mean) > mean:
        raise VolumeError(_why_uneven(slices, distances))
    ordered: list[Slice | None] = [None] * len(slices)
    for place, one in zip(places, slices, strict=True):
        ordered[place] = one
    return ordered


def _why_uneven(slices: list[Slice], distances: np.ndarray) -> str:
    """What is wrong with slices at these places along their normal."""
    order = np.argsort(distances, kind="stable")
    steps = np.diff(distances[order])
    typical = float(np.median(steps))
    doubled = np.flatnonzero(steps < max(0.01, 0.02 * typical))
    if doubled.size:
        one, other = slices[order[doubled[0]]], slices[order[doubled[0] + 1]]
        acquisitions = len({one.acquisition for one in slices})
        several = f"; it holds {acquisitions} acquisitions" if acquisitions > 1 else ""
        return (
            f"{doubled.size} of its slices lie where another does ({one.label} and {other.label})"
            f"{several}"
        )
    missing = np.rint(steps / typical).astype(int) - 1
    on_grid = np.abs(steps - (missing + 1) * typical) <= 2 * _allowed_stray(typical)
    if on_grid.all() and missing.sum() > 0:
        gap = int(np.argmax(missing > 0))
        one, other = slices[order[gap]], slices[order[gap + 1]]
        return (
            f"{missing.sum()} of its slices are missing: {steps[gap]:.2f} mm between {one.label} "
            f"and {other.label}, {typical:.2f} mm elsewhere"
        )
    return f"its slices are {steps.min():.2f} to {steps.max():.2f} mm apart"
