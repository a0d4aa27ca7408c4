"""Solids that organs are made of: ellipsoids and tapered capsules, in mm."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid, cut by planes: `centre` and `semi_axes` in mm, `axes` their unit rows (3, 3).

    A plane (normal, offset) keeps the points with normal · point < offset.
    """

    centre: np.ndarray
    semi_axes: np.ndarray
    axes: np.ndarray
    planes: tuple[tuple[tuple[float, float, float], float], ...] = ()

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest corner of the box around it, mm."""
        reach = np.sqrt(((self.axes * self.semi_axes[:, None]) ** 2).sum(0))
        return self.centre - reach, self.centre + reach

    def grown(self, margin: float) -> "Ellipsoid":
        """Return the same, `margin` mm thicker on all sides."""
        planes = tuple((n, offset + margin * float(np.linalg.norm(n))) for n, offset in self.planes)
        return replace(self, semi_axes=self.semi_axes + margin, planes=planes)

    def contains(self, s: np.ndarray, p: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Return which of the points (mm, float32, any shape) lie inside."""
        point = [x - float(c) for x, c in zip((s, p, left), self.centre, strict=True)]
        radius = np.zeros_like(s)
        for row in (self.axes / self.semi_axes[:, None]).tolist():
            along = sum(x * a for x, a in zip(point, row, strict=True) if abs(a) > 1e-9)
            radius += np.square(along)
        inside = radius < 1
        for normal, offset in self.planes:
            inside &= s * normal[0] + p * normal[1] + left * normal[2] < offset
        return inside


@dataclass(frozen=True)
class Capsule:
    """A tapered capsule from `start` to `end` (mm) with a radius (mm) at each."""

    start: np.ndarray
    end: np.ndarray
    radii: tuple[float, float]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest corner of the box around it, mm."""
        first, last = self.radii
        low = np.minimum(self.start - first, self.end - last)
        return low, np.maximum(self.start + first, self.end + last)

    def grown(self, margin: float) -> "Capsule":
        """Return the same, `margin` mm thicker on all sides."""
        return replace(self, radii=(self.radii[0] + margin, self.radii[1] + margin))

    def contains(self, s: np.ndarray, p: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Return which of the points (mm, float32, any shape) lie inside."""
        along = self.end - self.start
        along_s, along_p, along_l = (along / (along @ along)).tolist()
        s, p, left = (x - float(c) for x, c in zip((s, p, left), self.start, strict=True))
        t = np.clip(s * along_s + p * along_p + left * along_l, 0, 1)
        distance = np.zeros_like(s)
        for x, a in zip((s, p, left), along.tolist(), strict=True):
            distance += np.square(x - t * a)
        return distance < np.square(self.radii[0] + t * (self.radii[1] - self.radii[0]))


Solid = Ellipsoid | Capsule

Points = np.ndarray | Sequence[ArrayLike]


def _rotation(angles: ArrayLike) -> np.ndarray:
    """Return the rotation (3, 3) by angles (rad) about the superior, posterior and left axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.asarray(angles)):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def tube(points: Points, radii: ArrayLike, step: float = 9.0) -> list[Solid]:
    """Return capsules along a Catmull-Rom curve through points in mm, each with its radius."""
    knots = np.column_stack([np.asarray(points, float), np.asarray(radii, float)])
    padded = np.vstack([2 * knots[0] - knots[1], knots, 2 * knots[-1] - knots[-2]])
    parts = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        count = max(1, int(np.ceil(np.linalg.norm((c - b)[:3]) / step)))
        t = np.linspace(0, 1, count, endpoint=False)[:, None]
        linear, square, cube = c - a, 2 * a - 5 * b + 4 * c - d, 3 * b - a - 3 * c + d
        parts.append(b + 0.5 * (t * linear + t**2 * square + t**3 * cube))
    curve = np.vstack([*parts, knots[-1:]])
    return [Capsule(a[:3], b[:3], (float(a[3]), float(b[3]))) for a, b in pairwise(curve)]


def ellipsoid(centre: ArrayLike, semi_axes: ArrayLike, angles: ArrayLike = (0, 0, 0)) -> Ellipsoid:
    """Return an ellipsoid turned by angles (rad) about the superior, posterior and left axis."""
    return Ellipsoid(np.asarray(centre, float), np.asarray(semi_axes, float), _rotation(angles).T)
