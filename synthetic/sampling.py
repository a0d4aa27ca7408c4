"""A patient on a grid: deformed, and the map of structures voxel by voxel."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from inference.labels import ORGANS, TUMOR
from synthetic.body import (
    ABDOMINAL,
    CAVITY_AXES,
    CAVITY_CENTRE,
    SQUARENESS,
    TAPER_BODY,
    TAPER_CAVITY,
    TAPER_S,
    WALL_AXES,
    WALL_CENTRE,
)
from synthetic.grid import bspline_field, bspline_weights, slabs, voxel_positions
from synthetic.patient import Patient, draw_patient
from synthetic.shapes import Solid
from synthetic.structures import NUMBERS


def _torso(
    patient: Patient, slices: np.ndarray, p: np.ndarray, left: np.ndarray, s: np.ndarray
) -> np.ndarray:
    """Return the trunk (uint8) at `slices` (mm) and points of (n, P, L)."""

    def inside(centre: Sequence[float], axes: Sequence[float], taper: np.ndarray) -> np.ndarray:
        taper = np.maximum(taper, 1e-3).astype(np.float32)[:, None, None]
        u = np.square((p - centre[0]) / (axes[0] * taper))
        v = np.square((left - centre[1]) / (axes[1] * taper))
        # Above and below the squircle its formula has further branches: the box leaves them out.
        return (u + v - SQUARENESS * u * v < 1) & (u < 1) & (v < 1)

    anterior, posterior, side = patient.fat
    body_taper = np.interp(slices, TAPER_S, TAPER_BODY)
    cavity_taper = np.interp(slices, TAPER_S, TAPER_CAVITY)
    centre = (WALL_CENTRE[0] + (posterior - anterior) / 2, WALL_CENTRE[1])
    axes = (WALL_AXES[0] + (anterior + posterior) / 2, WALL_AXES[1] + side)
    torso = np.zeros(s.shape, np.uint8)
    torso[inside(centre, axes, body_taper)] = NUMBERS["skin"]
    torso[inside(centre, [a - 2 for a in axes], body_taper)] = NUMBERS["subcutaneous fat"]
    torso[inside(WALL_CENTRE, WALL_AXES, body_taper)] = NUMBERS["muscle"]
    cavity = inside(CAVITY_CENTRE, CAVITY_AXES, cavity_taper)
    base = float(patient.domes[0].centre[0])
    if slices.max() < base - 40:
        torso[cavity] = NUMBERS["visceral fat"]
        return torso
    diaphragm, abdomen = s < base, s < base
    for dome in patient.domes:
        diaphragm |= dome.grown(2.5).contains(s, p, left)
        abdomen |= dome.contains(s, p, left)
    torso[cavity] = NUMBERS["lung"]
    torso[cavity & diaphragm] = NUMBERS["muscle"]
    torso[cavity & abdomen] = NUMBERS["visceral fat"]
    return torso


class _Slab(NamedTuple):
    """Some slices of an anatomy while they are drawn."""

    numbers: np.ndarray  # uint8 (slices, rows, columns), drawn in place
    points: list[np.ndarray]  # of the patient at each voxel, mm: three (slices, rows, columns)
    grid: list[np.ndarray]  # voxel positions along each axis before deformation, mm
    margin: np.ndarray  # the farthest that the deformation moves a point along each axis, mm

    def paint(self, solid: Solid, number: int, over: np.ndarray) -> None:
        """Give a solid's voxels a number where `over` (256,) lets it cover what is there."""
        window = []
        for low, high, positions, reach in zip(
            *solid.bounds(), self.grid, self.margin, strict=True
        ):
            start, stop = np.searchsorted(positions, (low - reach, high + reach))
            if start == stop:
                return
            window.append(slice(int(start), int(stop)))
        numbers = self.numbers[tuple(window)]
        inside = solid.contains(*(x[tuple(window)] for x in self.points))
        inside &= over[numbers]
        numbers[inside] = number


def _remove_islands(anatomy: np.ndarray) -> None:
    """Turn islands of an organ to visceral fat, in place: each organ stays one component.

    Deformation and gaps may cut crumbs off an organ. A part that reaches the volume's edge may be
    joined to the rest outside the field of view, and stays.
    """
    boxes = ndimage.find_objects(anatomy, max_label=max(ORGANS))
    for number, box in enumerate(boxes, start=1):
        if box is None:
            continue
        view = anatomy[box]
        parts, count = ndimage.label(view == number)
        if count == 1:
            continue
        keep = np.zeros(count + 1, bool)
        keep[0] = True
        keep[np.argmax(np.bincount(parts.ravel())[1:]) + 1] = True
        for axis, (bounds, length) in enumerate(zip(box, anatomy.shape, strict=True)):
            if bounds.start == 0:
                keep[np.unique(parts.take(0, axis))] = True
            if bounds.stop == length:
                keep[np.unique(parts.take(-1, axis))] = True
        view[~keep[parts]] = NUMBERS["visceral fat"]


def draw_anatomy(
    shape: Sequence[int], spacing: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Draw a patient and sample the map of structures.

    The patient depends on `rng` alone: one seed on two grids is one patient seen twice. The volume
    is centred on the abdomen, which is 250 mm long; a shorter one is a crop around its middle, a
    longer one continues to lungs and pelvis. Shape and spacing, mm, are of slices, rows, columns.

    Returns:
        uint8 (slices, rows, columns) toward (superior, posterior, left), numbers of `STRUCTURES`.
        In a volume that holds the whole abdomen, each of the 13 organs is one 6-connected component
        at spacings up to 5 mm between slices and 2 mm between pixels.
    """
    patient = draw_patient(rng)
    anatomy = np.zeros(tuple(shape), np.uint8)
    positions = voxel_positions(shape, spacing)
    grid = [x / k + c for x, k, c in zip(positions, patient.scale, patient.centre, strict=True)]
    weights = [
        [bspline_weights(x, control.shape[1], step) for x in grid]
        for control, step in patient.fields
    ]
    back = WALL_CENTRE[0] + WALL_AXES[0] + patient.fat[1] + 6
    for slab in slabs(shape):
        here = [grid[0][slab], grid[1], grid[2]]
        columns = [here[0][:, None, None], here[1][:, None], here[2]]
        points, margin = [], np.zeros(3)
        for axis in range(3):
            moved = sum(
                bspline_field(control[axis], (w[0][slab], w[1], w[2]))
                for (control, _), w in zip(patient.fields, weights, strict=True)
            )
            margin[axis] = np.abs(moved).max()
            moved += columns[axis].astype(np.float32)
            points.append(moved)
        view = anatomy[slab]

        # The table does not deform with the patient; a shallow trough that the body covers.
        across, below = here[2], here[1][:, None] - back + (here[2] / 200) ** 2 * 30
        table = (below > 0) & (below < 45) & (np.abs(across) < 200)
        foam = (below > 4) & (below < 41) & (np.abs(across) < 196)
        view[:, table] = NUMBERS["table"]
        view[:, foam] = NUMBERS["table foam"]

        torso = _torso(patient, here[0], points[1], points[2], points[0])
        np.copyto(view, torso, where=torso > 0)

        drawn = _Slab(view, points, here, margin)
        for number, solids, over, gap in patient.layers:
            if gap:
                clear = over & ABDOMINAL
                clear[number] = False
                for solid in solids:
                    drawn.paint(solid.grown(gap), NUMBERS["visceral fat"], clear)
            for solid in solids:
                drawn.paint(solid, number, over)
        for host, solid in patient.tumors:
            drawn.paint(solid, TUMOR, np.arange(256) == host)
    _remove_islands(anatomy)
    return anatomy
