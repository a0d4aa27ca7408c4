"""A slab of an anatomy, as no patient has it: turned, scaled and deformed at random.

Axes are (slices, rows, columns), toward (superior, posterior, left); lengths are in mm.
"""

import numpy as np

from training.anatomies import Anatomy
from training.textures import smooth_noise


def _choose_level(anatomy: Anatomy, rng: np.random.Generator) -> float:
    """The slice, in voxels, around which to draw: half by label, as rare organs need."""
    if rng.random() < 0.6:
        labels = sorted(anatomy.slices_with)
        slices = anatomy.slices_with[labels[rng.integers(len(labels))]]
        return float(slices[rng.integers(len(slices))])
    return rng.uniform(0, anatomy.structures.shape[0] - 1)


def deformed_slab(
    anatomy: Anatomy, rng: np.random.Generator, size: int, pixel_mm: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Cut a deformed slab of the anatomy: nearest structures, and distances from the hull.

    Args:
        anatomy: to cut from.
        rng: source of everything random.
        size: rows and columns.
        pixel_mm: size of a pixel.

    Returns:
        (k, size, size): the structures in k planes through the thickness of the slice, and
        `beyond` in the same places, or None.
    """
    spacing = np.array(anatomy.spacing, np.float32)
    planes = int(rng.integers(1, 4))
    thickness = np.exp(rng.uniform(np.log(1.0), np.log(8.0)))
    depth = ((np.arange(planes) + 0.5) / planes - 0.5) * thickness
    across = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * pixel_mm

    tilt, turn, roll = np.radians(rng.normal(0, (4, 4, 7)))
    rotations = [
        np.array([[1, 0, 0], [0, np.cos(roll), -np.sin(roll)], [0, np.sin(roll), np.cos(roll)]]),
        np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]]),
        np.array([[np.cos(turn), 0, -np.sin(turn)], [0, 1, 0], [np.sin(turn), 0, np.cos(turn)]]),
    ]
    scale = np.exp(rng.normal(0, 0.1) + rng.normal(0, 0.06, 3))
    matrix = (rotations[0] @ rotations[1] @ rotations[2] / scale).astype(np.float32)

    # Millimetres from the middle of the slice, before and after.
    points = np.empty((3, planes, size, size), np.float32)
    for axis in range(3):
        points[axis] = (
            matrix[axis, 0] * depth[:, None, None]
            + matrix[axis, 1] * across[:, None]
            + matrix[axis, 2] * across
        )
    for distance, strength in ((90.0, rng.uniform(0, 9)), (30.0, rng.uniform(0, 3))):
        for axis in range(3):
            points[axis] += strength * smooth_noise(rng, size, distance / pixel_mm)

    shape = np.array(anatomy.structures.shape)
    centre = (shape - 1) / 2
    centre[0] = _choose_level(anatomy, rng)
    changed = rng.permutation(sorted(anatomy.boxes))[:4]
    for label in changed:
        middle, half = anatomy.boxes[label]
        growth = np.exp(rng.normal(0, 0.2))
        offset = ((middle - centre) * spacing).astype(np.float32)
        if abs(offset[0]) > 2 * half[0] + 20:
            continue
        away = [points[axis] - offset[axis] for axis in range(3)]
        square = sum((part / (1.2 * size)) ** 2 for part, size in zip(away, half, strict=True))
        weight = np.float32(1 / growth - 1) * np.exp(-square)
        for axis in range(3):
            points[axis] += weight * away[axis]

    index, outside = np.zeros(points.shape[1:], np.int64), np.zeros(points.shape[1:], bool)
    for axis in range(3):
        place = np.rint(points[axis] / spacing[axis] + np.float32(centre[axis])).astype(np.int32)
        if axis > 0:  # beyond the first and last slice, those go on
            outside |= (place < 0) | (place >= shape[axis])
        index = index * shape[axis] + np.clip(place, 0, shape[axis] - 1)
    structures = np.where(outside, 0, anatomy.structures.reshape(-1)[index])
    if anatomy.beyond is None:
        return structures, None
    return structures, np.where(outside, 255, anatomy.beyond.reshape(-1)[index])
