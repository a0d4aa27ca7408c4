"""A grid in mm: voxel positions, slabs of slices, and smooth fields of B-splines on it."""

from collections.abc import Sequence

import numpy as np

_SLAB_VOXELS = 2_000_000  # of a slab of slices that is drawn at once: bounds memory, fits caches


def bspline_weights(points: np.ndarray, count: int, step: float) -> np.ndarray:
    """Return cubic B-spline weights (points, count) of control points `step` mm apart around 0."""
    t = np.abs(points[:, None] / step - (np.arange(count) - (count - 1) / 2))
    near, far = 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, near, far).astype(np.float32)


def bspline_field(control: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Return the field (S, P, L) of a control grid (a, b, c) at weights (S, a), (P, b), (L, c)."""
    field = np.tensordot(weights[0], control, (1, 0))
    field = np.matmul(weights[1], field)
    return np.matmul(field, weights[2].T)


def voxel_positions(shape: Sequence[int], spacing: Sequence[float]) -> list[np.ndarray]:
    """Return voxel positions along each axis, mm from the volume's middle."""
    return [(np.arange(n) - (n - 1) / 2) * d for n, d in zip(shape, spacing, strict=True)]


def slabs(shape: Sequence[int]) -> list[slice]:
    """Return slices in groups of a bounded number of voxels."""
    thickness = max(1, _SLAB_VOXELS // (shape[1] * shape[2]))
    return [slice(i, min(i + thickness, shape[0])) for i in range(0, shape[0], thickness)]
