"""A synthetic abdominal CT with all 14 structures of the challenge and its exact label map.

The patient is a list of ellipsoids and tapered capsules in millimetres, bent by a smooth random
deformation and sampled on any grid: shape and spacing choose what is seen of a patient, the seed
chooses the patient. It stands in for real CT where truth must be known and no data may be shipped
(demonstration, tests, timings); it is a cartoon of an abdomen, and no accuracy measured on it says
anything about patients.

Axes are (slices, rows, columns), toward (superior, posterior, left), as everywhere in memory.
Points are (superior, posterior, left) in mm from the first lumbar vertebra (superior) and the
middle of the body (posterior, left).

    python -m benchmark.phantom --output DIR
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip
from scipy import ndimage

from inference.labels import LABEL_NAMES, ORGANS, TUMOR

PHASES = ("non-contrast", "arterial", "portal-venous", "delayed")
"""Contrast phases, in the order of the ranges in `STRUCTURES`."""

Range = tuple[float, float]


class Structure(NamedTuple):
    """What a number of the anatomy is and how it looks.

    Attributes:
        name: Name of the structure.
        hu: Range in HU of its mean in each of `PHASES`; a patient's value is drawn uniformly.
        texture: Standard deviation in HU of the smooth variation inside it.
    """

    name: str
    hu: tuple[Range, Range, Range, Range]
    texture: float


def _same(low: float, high: float) -> tuple[Range, Range, Range, Range]:
    return ((low, high),) * 4


_KIDNEY = ((28, 38), (130, 190), (150, 190), (120, 160))
_ADRENAL = ((22, 38), (55, 85), (60, 85), (45, 65))
_ARTERY = ((35, 48), (250, 380), (140, 185), (95, 130))
_VEIN = ((33, 46), (50, 100), (120, 170), (95, 130))

STRUCTURES = (
    Structure("air", _same(-1003, -995), 0),
    Structure("liver", ((45, 65), (58, 80), (95, 125), (80, 105)), 4),
    Structure("right kidney", _KIDNEY, 5),
    Structure("spleen", ((42, 55), (90, 140), (105, 135), (85, 110)), 4),
    Structure("pancreas", ((33, 46), (85, 120), (80, 110), (65, 85)), 7),
    Structure("aorta", _ARTERY, 2),
    Structure("inferior vena cava", _VEIN, 4),
    Structure("right adrenal gland", _ADRENAL, 3),
    Structure("left adrenal gland", _ADRENAL, 3),
    Structure("gallbladder", _same(2, 18), 2),
    Structure("esophagus", ((30, 42), (45, 65), (60, 80), (55, 70)), 6),
    Structure("stomach", ((30, 42), (55, 85), (70, 95), (60, 80)), 5),
    Structure("duodenum", ((18, 36), (40, 70), (50, 80), (45, 70)), 9),
    Structure("left kidney", _KIDNEY, 5),
    Structure("tumor", ((2, 18), (18, 42), (25, 70), (25, 55)), 5),
    Structure("skin", _same(0, 40), 5),
    Structure("subcutaneous fat", _same(-115, -95), 5),
    Structure("muscle", ((45, 60), (50, 65), (55, 70), (55, 70)), 8),
    Structure("visceral fat", _same(-110, -85), 8),
    Structure("lung", _same(-880, -780), 25),
    Structure("heart", ((35, 48), (150, 260), (120, 160), (90, 120)), 8),
    Structure("vertebra", _same(150, 300), 40),
    Structure("intervertebral disc", _same(60, 100), 8),
    Structure("spinal canal", _same(10, 35), 4),
    Structure("rib", _same(250, 450), 60),
    Structure("pelvis", _same(200, 350), 60),
    Structure("small bowel wall", ((25, 40), (60, 100), (70, 110), (60, 90)), 6),
    Structure("small bowel content", _same(0, 35), 8),
    Structure("colon wall", ((25, 40), (50, 80), (60, 90), (55, 80)), 6),
    Structure("colon content", _same(-60, 50), 40),
    Structure("bowel gas", _same(-950, -850), 10),
    Structure("portal vein", ((33, 46), (60, 120), (140, 190), (100, 130)), 3),
    Structure("arteries", _ARTERY, 2),
    Structure("veins", _VEIN, 3),
    Structure("urinary bladder", ((0, 12), (0, 12), (0, 30), (50, 250)), 3),
    Structure("table", _same(-200, -80), 5),
    Structure("table foam", _same(-970, -930), 3),
)
"""Every number of an anatomy: 0 air, 1 to 14 the challenge's labels, from 15 the surroundings.

The ranges are typical attenuation values of each tissue and phase, widened; those of tumor keep off
those of liver, kidneys and pancreas, so that a lesion always differs from its host.
"""

NUMBERS = {structure.name: number for number, structure in enumerate(STRUCTURES)}
"""The number of each structure by name."""

CORES = {
    "right kidney": (5.0, ((26, 36), (50, 90), (130, 175), (125, 165))),
    "left kidney": (5.0, ((26, 36), (50, 90), (130, 175), (125, 165))),
    "stomach": (3.5, _same(5, 35)),
}
"""Structures whose inside differs from their rim: (depth of the rim in mm, HU ranges by phase).

A kidney's medulla enhances later than its cortex; a stomach has contents, with gas above them.
"""

_ALIKE = (
    ("right kidney", "left kidney"),
    ("right adrenal gland", "left adrenal gland"),
    ("aorta", "arteries"),
    ("inferior vena cava", "veins"),
)
_GAS = -900.0

_SLAB_VOXELS = 2_000_000  # of a slab of slices that is drawn at once: bounds memory, fits caches

_SPINE_S = (-330, -260, -200, -137, -104, -68, 0, 60, 120, 190, 300)
_SPINE_P = (85, 75, 55, 24, 14, 15, 30, 40, 46, 48, 30)
_TAPER_S = (-420, -300, -200, -120, -60, 70, 140, 200, 250, 285, 320, 420)
_TAPER_BODY = (0.8, 0.95, 1.05, 1.0, 1.0, 1.0, 0.98, 0.93, 0.85, 0.7, 0.5, 0.45)
_TAPER_CAVITY = (0.0, 0.0, 0.72, 0.93, 1.0, 1.0, 0.95, 0.85, 0.65, 0.35, 0.0, 0.0)
_CAVITY_CENTRE, _CAVITY_AXES = (-12.0, 0.0), (95.0, 136.0)
_WALL_CENTRE, _WALL_AXES = (-2.0, 0.0), (112.0, 149.0)
_SQUARENESS = 0.5


def _spine(superior: float) -> float:
    """How far posterior the vertebral bodies' axis lies at a level, mm."""
    return float(np.interp(superior, _SPINE_S, _SPINE_P))


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
        """Lowest and highest corner of the box around it, mm."""
        reach = np.sqrt(((self.axes * self.semi_axes[:, None]) ** 2).sum(0))
        return self.centre - reach, self.centre + reach

    def grown(self, margin: float) -> "Ellipsoid":
        """The same, `margin` mm thicker on all sides."""
        planes = tuple((n, offset + margin * float(np.linalg.norm(n))) for n, offset in self.planes)
        return replace(self, semi_axes=self.semi_axes + margin, planes=planes)

    def contains(self, s: np.ndarray, p: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Which of the points (mm, float32, any shape) lie inside."""
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
        """Lowest and highest corner of the box around it, mm."""
        first, last = self.radii
        low = np.minimum(self.start - first, self.end - last)
        return low, np.maximum(self.start + first, self.end + last)

    def grown(self, margin: float) -> "Capsule":
        """The same, `margin` mm thicker on all sides."""
        return replace(self, radii=(self.radii[0] + margin, self.radii[1] + margin))

    def contains(self, s: np.ndarray, p: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Which of the points (mm, float32, any shape) lie inside."""
        along = self.end - self.start
        along_s, along_p, along_l = (along / (along @ along)).tolist()
        s, p, left = (x - float(c) for x, c in zip((s, p, left), self.start, strict=True))
        t = np.clip(s * along_s + p * along_p + left * along_l, 0, 1)
        distance = np.zeros_like(s)
        for x, a in zip((s, p, left), along.tolist(), strict=True):
            distance += np.square(x - t * a)
        return distance < np.square(self.radii[0] + t * (self.radii[1] - self.radii[0]))


Solid = Ellipsoid | Capsule


class Layer(NamedTuple):
    """Solids of one structure, and what they may cover: (256,) bool by number.

    A positive `gap` first clears that many mm around them to visceral fat.
    """

    number: int
    solids: list[Solid]
    over: np.ndarray
    gap: float = 0.0


@dataclass(frozen=True)
class _Patient:
    """Everything random about a patient's anatomy, independent of the grid."""

    layers: list[Layer]
    tumors: list[tuple[int, Solid]]
    centre: np.ndarray  # of the field of view, mm
    scale: np.ndarray  # size along each axis
    fields: list[
        tuple[np.ndarray, float]
    ]  # control displacements (3, n, n, n) in mm and step in mm
    fat: tuple[float, float, float]  # subcutaneous, mm: anterior, posterior, at the sides
    domes: list[Ellipsoid]


def _numbers(*names: str) -> np.ndarray:
    chosen = np.zeros(256, bool)
    chosen[[NUMBERS[name] for name in names]] = True
    return chosen


_ABDOMINAL = _numbers(
    "visceral fat", "small bowel wall", "small bowel content", "colon wall", "colon content",
    "bowel gas", "portal vein", "arteries", "veins", *LABEL_NAMES[1:],
)  # fmt: skip
_TRUNK = _ABDOMINAL | _numbers("lung", "heart", "muscle")
_SOLID_BODY = _numbers("muscle", "visceral fat", "subcutaneous fat", "lung")


def _rotation(angles: Sequence[float]) -> np.ndarray:
    """Rotation matrix (3, 3) by angles (rad) about the superior, posterior and left axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def _tube(
    points: Sequence[Sequence[float]], radii: Sequence[float], step: float = 9.0
) -> list[Solid]:
    """Capsules along a Catmull-Rom curve through points (n, 3) in mm, each with its radius."""
    knots = np.column_stack([np.asarray(points, float), np.asarray(radii, float)])
    padded = np.vstack([2 * knots[0] - knots[1], knots, 2 * knots[-1] - knots[-2]])
    curve = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        count = max(1, int(np.ceil(np.linalg.norm((c - b)[:3]) / step)))
        t = np.linspace(0, 1, count, endpoint=False)[:, None]
        linear, square, cube = c - a, 2 * a - 5 * b + 4 * c - d, 3 * b - a - 3 * c + d
        curve.append(b + 0.5 * (t * linear + t**2 * square + t**3 * cube))
    curve = np.vstack([*curve, knots[-1:]])
    return [Capsule(a[:3], b[:3], (float(a[3]), float(b[3]))) for a, b in pairwise(curve)]


def _ellipsoid(
    centre: Sequence[float], semi_axes: Sequence[float], angles: Sequence[float] = (0, 0, 0)
) -> Ellipsoid:
    return Ellipsoid(np.asarray(centre, float), np.asarray(semi_axes, float), _rotation(angles).T)


def _outline(theta: float, thickness: float, superior: float) -> tuple[float, float, float]:
    """A point `thickness` mm outside the cavity at an angle (0 posterior, π/2 left), mm."""
    sine, cosine = np.sin(theta), np.cos(theta)
    product = _SQUARENESS * (sine * cosine) ** 2
    reach = 1.0 if product < 1e-9 else np.sqrt((1 - np.sqrt(1 - 4 * product)) / (2 * product))
    taper = float(np.interp(superior, _TAPER_S, _TAPER_CAVITY))
    posterior, left = (a * taper + thickness for a in _CAVITY_AXES)
    return superior, _CAVITY_CENTRE[0] + posterior * reach * cosine, left * reach * sine


def _skeleton() -> list[Layer]:
    """Spine, ribs and pelvis; muscles beside the spine."""
    levels = [*range(-137, 0, 34), *range(0, 300, 30)]
    muscles, discs, canal, vertebrae, ribs, pelvis = [], [], [], [], [], []
    column = range(-250, 320, 15)
    discs += _tube([(s, _spine(s), 0) for s in column], [17 if s < 60 else 14 for s in column])
    canal += _tube([(s, _spine(s) + 26, 0) for s in column if s > -210], [7.5] * 35)
    muscles += _tube([(s, min(_spine(s) + 42, 80), 0) for s in column], [20 for _ in column])
    for side in (-1, 1):
        muscles += _tube(
            [(s, min(_spine(s) + 50, 84), side * 34) for s in column],
            [24 if s < 150 else 18 for s in column],
        )
        muscles += _tube(
            [
                (10, 34, side * 26),
                (-60, 18, side * 34),
                (-140, 8, side * 48),
                (-260, -5, side * 80),
            ],
            [6, 15, 21, 20],
        )
        # Iliac wing, and the femur's head and shaft.
        for depth in np.linspace(0, 1, 7):
            pelvis += _tube(
                [
                    (-135 - 75 * depth, 20 - 40 * (1 - depth), side * (128 - 25 * depth)),
                    (-145 - 60 * depth, 55, side * (90 - 20 * depth)),
                    (-165 - 30 * depth, 68, side * (50 - 5 * depth)),
                ],
                [5, 6, 7],
            )
        pelvis += _tube(
            [
                (-205, 15, side * 98),
                (-245, 5, side * 88),
                (-300, 0, side * 80),
                (-600, 5, side * 80),
            ],
            [14, 24, 16, 14],
        )
    pelvis += _tube([(-160, _spine(-160), 0), (-240, 82, 0)], [20, 9])
    for level in levels:
        axis, width = _spine(level), 23 if level < 60 else 18
        body = _ellipsoid((level, axis, 0), (30, width * 0.8, width))
        half = 13 if level < 60 else 11
        vertebrae.append(
            replace(body, planes=(((1, 0, 0), level + half), ((-1, 0, 0), half - level)))
        )
        vertebrae += _tube([(level, axis + 38, 0), (level - 10, axis + 55, 0)], [6, 4])
        for side in (-1, 1):
            vertebrae += _tube(
                [
                    (level, axis + 12, side * 15),
                    (level, axis + 27, side * 16),
                    (level, axis + 38, 0),
                ],
                [6, 6, 5],
            )
            vertebrae += _tube(
                [(level, axis + 27, side * 16), (level, axis + 32, side * 38)], [5, 3]
            )
    for number, level in enumerate(range(30, 300, 30)):
        reach = np.radians((60, 88, 120, 128, 135)[min(number, 4)])
        for side in (-1, 1):
            angles = np.linspace(np.radians(28), reach, 9)
            drop = np.degrees(angles - angles[0]) * 0.55
            path = [_outline(side * a, 7, level - d) for a, d in zip(angles, drop, strict=True)]
            ribs += _tube(path, [4.5] * len(path), step=14)
    front = [_outline(np.pi, 6, s) for s in range(100, 280, 20)]
    ribs += _tube(front, [6] * len(front))
    return [
        Layer(NUMBERS["muscle"], muscles, _SOLID_BODY),
        Layer(NUMBERS["intervertebral disc"], discs, _SOLID_BODY),
        Layer(NUMBERS["pelvis"], pelvis, _SOLID_BODY),
        Layer(NUMBERS["rib"], ribs, _SOLID_BODY),
        Layer(NUMBERS["vertebra"], vertebrae, _SOLID_BODY | _numbers("intervertebral disc")),
        Layer(
            NUMBERS["spinal canal"],
            canal,
            _SOLID_BODY | _numbers("vertebra", "intervertebral disc", "pelvis"),
        ),
    ]


def _bowel(near: Callable[..., np.ndarray], rng: np.random.Generator) -> list[Layer]:
    """Loops of small bowel and the frame of the colon; `near` shakes a point."""
    fat = _numbers("visceral fat")
    loops = []
    for row, s in enumerate(range(-45, -250, -27)):
        columns = np.arange(-78, 79, 26)[:: 1 if row % 2 else -1]
        loops += [
            near((s, p, column), 7)
            for k, column in enumerate(columns)
            for p in (-28, -54, -80)[:: 1 if k % 2 else -1]
        ]
    radii = rng.uniform(9.5, 13.5, len(loops))
    small = _tube(loops, radii)
    frame = np.array(
        [
            (-215, 5, -95), (-170, 10, -105), (-125, 12, -110), (-82, 0, -104), (-62, -45, -92),
            (-72, -78, -55), (-82, -84, 0), (-66, -80, 50), (-32, -55, 98), (0, -10, 122),
            (-40, 22, 118), (-100, 30, 116), (-160, 25, 108), (-205, 20, 80), (-235, 25, 30),
        ],
        float,
    )  # fmt: skip
    frame += rng.uniform(-5, 5, frame.shape)
    calibre = rng.uniform(14, 20, len(frame))
    colon = _tube(frame, calibre)
    filled = [part.grown(-2.5) for part in colon]
    gas = [part.grown(-4.0) for part in colon if rng.random() < 0.45]
    return [
        Layer(NUMBERS["small bowel wall"], small, fat),
        Layer(
            NUMBERS["small bowel content"],
            [part.grown(-2.5) for part in small],
            _numbers("small bowel wall"),
        ),
        Layer(
            NUMBERS["colon wall"], colon, fat | _numbers("small bowel wall", "small bowel content")
        ),
        Layer(NUMBERS["colon content"], filled, _numbers("colon wall")),
        Layer(NUMBERS["bowel gas"], gas, _numbers("colon content")),
    ]


def _draw_patient(rng: np.random.Generator) -> _Patient:
    """Draw a patient; the number of random draws does not depend on any grid."""

    def near(point: Sequence[float], by: float = 2.5) -> np.ndarray:
        return np.asarray(point, float) + rng.uniform(-by, by, 3)

    def size(by: float = 0.08) -> float:
        return float(rng.uniform(1 - by, 1 + by))

    def angles(*mean: float, by: float = 0.1) -> np.ndarray:
        return np.asarray(mean) + rng.uniform(-by, by, 3)

    def path(points: Sequence[Sequence[float]], by: float = 2.5) -> list[np.ndarray]:
        shift = rng.uniform(-by, by, 3)
        return [near(point, by) + shift for point in points]

    scale = rng.uniform(0.94, 1.06) * rng.uniform(0.97, 1.03, 3)
    centre = np.array([5.0, 0.0, 0.0]) + rng.uniform(-1, 1, 3) * (4, 8, 8)
    steps = ((75.0, 9, 20.0), (26.0, 25, 5.0))  # (step mm, control points per axis, limit mm)
    fields = [
        (rng.uniform(-limit, limit, (3, n, n, n)).astype(np.float32), step)
        for step, n, limit in steps
    ]
    thickness = float(rng.uniform(4, 24))
    fat = (thickness * size(0.3), 6 + 0.5 * thickness * size(0.3), 3 + 0.6 * thickness * size(0.3))

    right_top, left_top = rng.uniform(84, 96), rng.uniform(72, 84)
    domes = [
        _ellipsoid((15, -12, -64), (right_top, 98, 82)),
        _ellipsoid((15, -12, 64), (left_top, 98, 82)),
        _ellipsoid((15, -12, 0), (72, 98, 100)),
    ]

    # Liver: what fills the right dome and reaches over to the left, cut by its visceral surface.
    right_lobe = _ellipsoid(
        near((14, -12, -72)), np.array((right_top - 2, 81, 67)) * size(0.05), angles(0, 0, 0)
    )
    left_lobe = _ellipsoid(near((48, -58, 8)), np.array((27, 33, 60)) * size(), angles(0, 0.1, 0))
    visceral = ((-1.0, 0.35, 0.62), 0.62 * -60 + 19 + rng.uniform(-6, 6))
    posterior = ((-0.6, 1.0, 0.6), rng.uniform(-3, 7))  # it lies in front of the kidney
    liver = [replace(lobe, planes=(visceral, posterior)) for lobe in (right_lobe, left_lobe)]

    kidneys = {}
    for side, s in ((-1, -36), (1, -20)):
        middle = near((s, 30, side * 69), 3.5)
        turn = angles(0, side * -0.22, 0.12, by=0.07)
        kidneys[side] = (
            _ellipsoid(middle, np.array((53, 27, 28)) * size(), turn),
            _ellipsoid(
                middle + np.array((0, -7, -side * 21)), np.array((19, 9, 15)) * size(), turn
            ),
        )

    spleen = _ellipsoid(
        near((28, 36, 101), 4), np.array((52, 52, 24)) * size(0.12), angles(-0.62, 0, 0.1)
    )

    stomach_path = path([(62, 14, 66), (35, -25, 78), (0, -58, 66), (-24, -70, 30), (-22, -64, -8)])
    pylorus = near((-17, -57, -31), 2)
    stomach = _tube([*stomach_path, pylorus], np.array((28, 28, 25, 20, 14, 9)) * size(0.12))

    duodenum = _tube(
        [
            pylorus + np.array((0, 3, -3)),
            *path(
                [
                    (-14, -42, -50), (-42, -34, -57), (-66, -38, -48), (-76, -46, -20),
                    (-70, -46, 12), (-50, -40, 34),
                ],
                2,
            ),
        ],
        np.array((9, 12, 12, 12, 11, 11, 10)) * size(0.1),
    )  # fmt: skip

    head = near((-40, -40, -27), 2)
    pancreas_path = [head, *path([(-20, -42, -20), (-4, -44, 4), (4, -30, 34)], 2)]
    pancreas_path += path([(12, -14, 62), (20, -2, 84)], 2)
    pancreas = _tube(pancreas_path, np.array((14.5, 14.5, 9.5, 10.5, 11.5, 8.5)) * size(0.1))

    gallbladder = _tube(
        path([(-8, -38, -56), (-20, -54, -66), (-32, -72, -74)]), np.array((6, 13, 14)) * size(0.2)
    )

    # An adrenal gland is a ridge with two limbs behind it: plates that meet at the ridge.
    adrenals = {}
    for side, ridge in ((-1, near((22, 2, -33), 1.5)), (1, near((20, 0, 40), 1.5))):
        plates = ((-0.25, 1.0), (0.55, 1.0), (0.1, -0.55))
        adrenals[side] = []
        for slope, reach in plates:
            turn = side * slope + rng.uniform(-0.08, 0.08)
            direction = np.array((-0.12, np.cos(turn), np.sin(turn)))
            extent = np.array((14.5, 11.0 * max(abs(reach), 0.7), 2.7)) * size(0.06)
            plate = _ellipsoid(ridge + 10 * reach * direction, extent, (turn, 0, 0))
            adrenals[side].append(plate)

    aorta_levels = (190, 150, 110, 70, 30, -10, -50, -105)
    bifurcation = near((-105, _spine(-105) - 27, 5), 1.5)
    aorta = _tube(
        [
            near((180, -42, -4), 1), near((202, -33, -4), 1), near((218, -8, 8), 1),
            *[
                near((s, _spine(s) - 29 + max(0, s - 70) * 0.08, 11 + max(0, s - 30) * 0.06), 1)
                for s in aorta_levels[:-1]
            ],
            bifurcation,
        ],
        np.array((14, 14, 13, 12.5, 12, 11.5, 11.5, 11, 10.5, 10, 9)) * size(0.12),
    )  # fmt: skip
    confluence = near((-118, _spine(-118) - 24, -14), 1)
    cava = _tube(
        [
            confluence,
            *[near(x, 1) for x in ((-70, _spine(-70) - 31, -18), (-30, _spine(-30) - 34, -19))],
            *[
                near(x, 1)
                for x in ((10, -12, -21), (55, -14, -25), (95, -18, -24), (118, -24, -20))
            ],
        ],
        np.array((9, 10, 10.5, 11, 12, 12, 12)) * size(0.12),
    )
    esophagus = _tube(
        [
            (310, 5, 0), (220, 8, 2), (150, 2, 0), *path([(100, -12, 6), (72, -20, 16)], 1.5),
            near((54, -16, 34), 1.5), stomach_path[0] + (-10, -14, -14),
        ],
        np.array((8, 8, 8, 8, 8.5, 9, 9)) * size(0.1),
    )  # fmt: skip

    arteries = _tube(
        [(-8, -12, 9), (-30, -34, 7), (-100, -48, 2), (-170, -50, -25)], [4, 4, 3.5, 2.5]
    )
    arteries += _tube([(12, -8, 9), (14, -30, 8), (16, -38, -10), (14, -48, -35)], [4, 3.5, 3, 2.5])
    veins = []
    for side in (-1, 1):
        iliac = ((-150, 12, side * 26), (-210, 2, side * 58), (-280, -28, side * 82))
        arteries += _tube([bifurcation, *iliac], [7, 5.5, 5, 4.5])
        veins += _tube(
            [confluence, *((s, p + 12, left - 4 * side) for s, p, left in iliac)], [8, 7, 6, 6]
        )
        renal = kidneys[side][1].centre
        veins += _tube([renal, (renal[0] + 8, -10, side * 30), (-14, -22, -14)], [5, 5, 4.5])
    portal = _tube(
        [(-160, -52, -30), (-75, -52, -10), (-22, -36, -12), (0, -34, -26), (16, -34, -48)],
        [3.5, 5, 6.5, 7, 7],
    )
    portal += _tube([(-16, -34, -8), (2, -22, 36), (24, 4, 84)], [5, 4.5, 4])

    # Lesions, away from where they could cut their host in two.
    tumors = []
    hosts = ["liver", *rng.choice(("liver", "right kidney", "left kidney", "pancreas"), 3).tolist()]
    first = int(rng.integers(4))
    for host in (hosts[first:] + hosts[:first])[: int(rng.integers(1, 5))]:
        if host == "liver":
            away = rng.uniform(-0.55, 0.55, 3) * right_lobe.semi_axes
            place, radius = np.array((32, -10, -78)) + away * (0.5, 1, 0.75), rng.uniform(7, 24)
        elif host == "pancreas":
            place, radius = head - np.array((4, 3, 0)), rng.uniform(6, 9)
        else:
            kidney = kidneys[-1 if host == "right kidney" else 1][0]
            pole = rng.choice((-1, 1)) * 0.68 * kidney.semi_axes[0]
            place = kidney.centre + kidney.axes[0] * pole + (0, 0, np.sign(kidney.centre[2]) * 5)
            radius = rng.uniform(6, 14)
        shape = radius * rng.uniform(0.8, 1.2, 3)
        tumors.append((NUMBERS[host], _ellipsoid(place, shape, rng.uniform(-1, 1, 3))))

    def organ(name: str, solids: list[Solid], gap: float = 0.0) -> Layer:
        return Layer(NUMBERS[name], solids, _ABDOMINAL, gap)

    layers = [
        Layer(
            NUMBERS["visceral fat"],
            _tube([(95, 0, 0), (300, -10, 0)], [36, 26]),  # mediastinum
            _numbers("lung"),
        ),
        Layer(
            NUMBERS["heart"],
            [_ellipsoid((136, -48, 22), (46, 44, 58), (0.5, 0.35, 0))],
            _numbers("lung", "visceral fat"),
        ),
        *_skeleton(),
        *_bowel(near, rng),
        Layer(
            NUMBERS["urinary bladder"],
            [_ellipsoid((-248, -15, 0), (32, 32, 42))],
            _ABDOMINAL,
        ),
        organ("liver", liver, 1.5),
        organ("spleen", [spleen], 1.5),
        Layer(NUMBERS["esophagus"], esophagus, _TRUNK, 1.5),
        organ("stomach", stomach, 1.2),
        organ("right kidney", [kidneys[-1][0]], 3.5),
        organ("left kidney", [kidneys[1][0]], 3.5),
        organ("visceral fat", [kidneys[-1][1], kidneys[1][1]]),  # renal sinus
        organ("veins", veins),
        organ("arteries", arteries, 1.0),
        organ("portal vein", portal),
        organ("duodenum", duodenum, 1.0),
        organ("pancreas", pancreas, 1.0),
        organ("gallbladder", gallbladder, 0.8),
        Layer(NUMBERS["inferior vena cava"], cava, _TRUNK, 1.2),
        Layer(NUMBERS["aorta"], aorta, _TRUNK, 1.5),
        organ("right adrenal gland", adrenals[-1], 1.5),
        organ("left adrenal gland", adrenals[1], 1.5),
    ]
    return _Patient(layers, tumors, centre, scale, fields, fat, domes)


def _bspline_weights(points: np.ndarray, count: int, step: float) -> np.ndarray:
    """Cubic B-spline weights (len(points), count) of control points `step` mm apart around 0."""
    t = np.abs(points[:, None] / step - (np.arange(count) - (count - 1) / 2))
    near, far = 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, near, far).astype(np.float32)


def _bspline_field(control: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """The smooth field of a control grid (a, b, c) at weights (S, a), (P, b), (L, c): (S, P, L)."""
    field = np.tensordot(weights[0], control, (1, 0))
    field = np.matmul(weights[1], field)
    return np.matmul(field, weights[2].T)


def _grid(shape: Sequence[int], spacing: Sequence[float]) -> list[np.ndarray]:
    """Voxel positions along each axis, mm from the volume's middle."""
    return [(np.arange(n) - (n - 1) / 2) * d for n, d in zip(shape, spacing, strict=True)]


def _slabs(shape: Sequence[int]) -> list[slice]:
    thickness = max(1, _SLAB_VOXELS // (shape[1] * shape[2]))
    return [slice(i, min(i + thickness, shape[0])) for i in range(0, shape[0], thickness)]


def _check(shape: Sequence[int], spacing: Sequence[float]) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"a phantom's shape is three positive numbers of voxels, not {tuple(shape)}"
        )
    if len(spacing) != 3 or not all(0 < d < np.inf for d in spacing):
        raise ValueError(
            f"a phantom's spacing is three positive numbers of mm, not {tuple(spacing)}"
        )


def _torso(
    patient: _Patient, slices: np.ndarray, p: np.ndarray, left: np.ndarray, s: np.ndarray
) -> np.ndarray:
    """Skin, fat, muscle, lungs and abdominal cavity (uint8); `slices` in mm, the rest (n, P, L)."""

    def inside(centre: Sequence[float], axes: Sequence[float], taper: np.ndarray) -> np.ndarray:
        taper = np.maximum(taper, 1e-3).astype(np.float32)[:, None, None]
        u = np.square((p - centre[0]) / (axes[0] * taper))
        v = np.square((left - centre[1]) / (axes[1] * taper))
        # Above and below the squircle its formula has further branches: the box leaves them out.
        return (u + v - _SQUARENESS * u * v < 1) & (u < 1) & (v < 1)

    anterior, posterior, side = patient.fat
    body_taper = np.interp(slices, _TAPER_S, _TAPER_BODY)
    cavity_taper = np.interp(slices, _TAPER_S, _TAPER_CAVITY)
    centre = (_WALL_CENTRE[0] + (posterior - anterior) / 2, _WALL_CENTRE[1])
    axes = (_WALL_AXES[0] + (anterior + posterior) / 2, _WALL_AXES[1] + side)
    torso = np.zeros(s.shape, np.uint8)
    torso[inside(centre, axes, body_taper)] = NUMBERS["skin"]
    torso[inside(centre, [a - 2 for a in axes], body_taper)] = NUMBERS["subcutaneous fat"]
    torso[inside(_WALL_CENTRE, _WALL_AXES, body_taper)] = NUMBERS["muscle"]
    cavity = inside(_CAVITY_CENTRE, _CAVITY_AXES, cavity_taper)
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
    points: list[
        np.ndarray
    ]  # where the patient is at each voxel, mm: three (slices, rows, columns)
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
    longer one goes on to lungs and pelvis.

    Args:
        shape: Numbers of slices, rows and columns.
        spacing: Spacing of slices, rows and columns in mm.
        rng: Source of everything random.

    Returns:
        uint8 (slices, rows, columns) toward (superior, posterior, left), numbers of `STRUCTURES`.
        In a volume that holds the whole abdomen, each of the 13 organs is one 6-connected component
        at spacings up to 5 mm between slices and 2 mm between pixels.

    Raises:
        ValueError: Shape or spacing is not three positive numbers.
    """
    _check(shape, spacing)
    patient = _draw_patient(rng)
    anatomy = np.zeros(tuple(shape), np.uint8)
    positions = _grid(shape, spacing)
    grid = [x / k + c for x, k, c in zip(positions, patient.scale, patient.centre, strict=True)]
    weights = [
        [_bspline_weights(x, control.shape[1], step) for x in grid]
        for control, step in patient.fields
    ]
    back = _WALL_CENTRE[0] + _WALL_AXES[0] + patient.fat[1] + 6
    for slab in _slabs(shape):
        here = [grid[0][slab], grid[1], grid[2]]
        columns = [here[0][:, None, None], here[1][:, None], here[2]]
        points, margin = [], np.zeros(3)
        for axis in range(3):
            moved = sum(
                _bspline_field(control[axis], (w[0][slab], w[1], w[2]))
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
                clear = over & _ABDOMINAL
                clear[number] = False
                for solid in solids:
                    drawn.paint(solid.grown(gap), NUMBERS["visceral fat"], clear)
            for solid in solids:
                drawn.paint(solid, number, over)
        for host, solid in patient.tumors:
            drawn.paint(solid, TUMOR, np.arange(256) == host)
    _remove_islands(anatomy)
    return anatomy


def _core(mask: np.ndarray, depth: float, spacing: Sequence[float]) -> np.ndarray:
    """Where a mask is farther than about `depth` mm from its surface."""
    smooth = mask.astype(np.float32)
    # Across a flat surface a step blurred with this sigma reaches 0.84 one sigma inside.
    ndimage.gaussian_filter(smooth, [depth / d for d in spacing], output=smooth, truncate=2)
    return mask & (smooth > 0.84)


def render(
    anatomy: np.ndarray, spacing: Sequence[float], rng: np.random.Generator, phase: str
) -> np.ndarray:
    """Render a map of structures as CT: HU per structure, texture, partial volume and noise.

    Args:
        anatomy: uint8 (slices, rows, columns) as `draw_anatomy` returns it.
        spacing: Spacing of slices, rows and columns in mm.
        rng: Source of everything random.
        phase: One of `PHASES`.

    Returns:
        int16 (slices, rows, columns) in HU, within −1024 to 3071.

    Raises:
        ValueError: The phase is unknown, or shape or spacing is not three positive numbers.
    """
    _check(anatomy.shape, spacing)
    if phase not in PHASES:
        raise ValueError(f"no contrast phase '{phase}': choose from {', '.join(PHASES)}")
    column = PHASES.index(phase)
    levels = np.zeros(256, np.float32)
    textures = np.zeros(256, np.float32)
    for number, structure in enumerate(STRUCTURES):
        levels[number] = rng.uniform(*structure.hu[column])
        textures[number] = structure.texture
    for one, other in _ALIKE:
        levels[NUMBERS[other]] = levels[NUMBERS[one]]
    inner = {name: rng.uniform(*ranges[column]) for name, (_, ranges) in CORES.items()}
    inner["left kidney"] = inner["right kidney"]
    gas_share = max(0.0, rng.uniform(-0.2, 0.5))
    lesion_levels = rng.uniform(*STRUCTURES[TUMOR].hu[column], 64)
    sigma = rng.uniform(0.5, 0.8)  # mm: of the reconstruction kernel in the slice
    noise_level = rng.uniform(6, 16)  # HU
    control = rng.standard_normal((40, 40, 40), dtype=np.float32) / 0.33
    step = 12.0  # mm between the texture's control points, which repeat every 40

    hu = levels[anatomy]
    boxes = ndimage.find_objects(anatomy, max_label=TUMOR)
    for name, (depth, _) in CORES.items():
        box = boxes[NUMBERS[name] - 1]
        if box is None:
            continue
        core = _core(anatomy[box] == NUMBERS[name], depth, spacing)
        hu[box][core] = inner[name]
        if name == "stomach" and core.any():
            rows = np.arange(core.shape[1])[None, :, None]
            gas = rows < gas_share * core.shape[1]
            hu[box][core & gas] = _GAS
    if boxes[TUMOR - 1] is not None:
        box = boxes[TUMOR - 1]
        lesions, _ = ndimage.label(anatomy[box] == TUMOR)
        hu[box][lesions > 0] = lesion_levels[lesions[lesions > 0] % len(lesion_levels)]

    weights = []
    for points, count in zip(_grid(anatomy.shape, spacing), control.shape, strict=True):
        cells = int(np.ceil(np.ptp(points) / step)) + 4
        weight = _bspline_weights(points, cells, step)
        folded = np.zeros((len(points), count), np.float32)
        for cell in range(cells):
            folded[:, cell % count] += weight[:, cell]
        weights.append(folded)
    for slab in _slabs(anatomy.shape):
        texture = _bspline_field(control, (weights[0][slab], weights[1], weights[2]))
        texture *= textures[anatomy[slab]]
        hu[slab] += texture

    blur = (0.35, sigma / spacing[1], sigma / spacing[2])  # a slice's profile spans its spacing
    ndimage.gaussian_filter(hu, blur, output=hu, truncate=3)
    grain = (0.0, 0.6 / spacing[1], 0.6 / spacing[2])
    impulse = np.zeros((1, 41, 41), np.float32)
    impulse[0, 20, 20] = 1
    gain = np.sqrt(np.square(ndimage.gaussian_filter(impulse, grain, truncate=3)).sum())
    volume = np.empty(anatomy.shape, np.int16)
    for slab in _slabs(anatomy.shape):
        noise = rng.standard_normal(hu[slab].shape, dtype=np.float32)
        ndimage.gaussian_filter(noise, grain, output=noise, truncate=3, mode="wrap")
        noise *= noise_level / gain
        noise += hu[slab]
        volume[slab] = np.clip(np.rint(noise, out=noise), -1024, 3071, out=noise)
    return volume


@dataclass(frozen=True)
class Phantom:
    """A synthetic CT and its truth.

    Attributes:
        volume: int16 (slices, rows, columns) in HU.
        label_map: uint8 (slices, rows, columns), the challenge's labels; all else is 0.
        spacing: Spacing of slices, rows and columns in mm.
        phase: Contrast phase, one of `PHASES`.
        seed: The seed it was drawn from.
    """

    volume: np.ndarray
    label_map: np.ndarray
    spacing: tuple[float, float, float]
    phase: str
    seed: int


def draw_phantom(
    shape: tuple[int, int, int] = (100, 512, 512),
    spacing: tuple[float, float, float] = (2.5, 0.8, 0.8),
    seed: int = 0,
    phase: str | None = None,
) -> Phantom:
    """Draw a synthetic abdominal CT; the same arguments give the same phantom.

    Args:
        shape: Numbers of slices, rows and columns.
        spacing: Spacing of slices, rows and columns in mm.
        seed: Seed of the patient and of the noise, 0 or more.
        phase: One of `PHASES`; None draws one from the seed.

    Raises:
        ValueError: An argument is out of range.
    """
    if phase is not None and phase not in PHASES:
        raise ValueError(f"no contrast phase '{phase}': choose from {', '.join(PHASES)}")
    anatomy_rng, look_rng, phase_rng = np.random.default_rng(seed).spawn(3)
    drawn = PHASES[phase_rng.integers(len(PHASES))] if phase is None else phase
    anatomy = draw_anatomy(shape, spacing, anatomy_rng)
    volume = render(anatomy, spacing, look_rng, drawn)
    label_map = np.where(anatomy <= TUMOR, anatomy, 0).astype(np.uint8)
    return Phantom(volume, label_map, tuple(spacing), drawn, seed)


def write_nifti(path: Path, array: np.ndarray, spacing: Sequence[float]) -> None:
    """Write an array (slices, rows, columns) as an LPS NIfTI file, its middle at the origin.

    Args:
        path: Where to, ending in `.nii.gz`; it appears complete or not at all.
        array: int16 or uint8 toward (superior, posterior, left).
        spacing: Spacing of slices, rows and columns in mm.

    Raises:
        OSError: The file cannot be written.
    """
    steps = np.array([-spacing[2], -spacing[1], spacing[0]])  # NIfTI counts toward right, anterior
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -steps * (np.array(array.shape[::-1]) - 1) / 2
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(igzip.compress(image.to_bytes(), 2))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _number(kind: Callable[[str], float], least: float, what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = np.nan
        if not least <= value < np.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not {what}")
        return value

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Write phantoms as a data set; 0 all written, 1 some could not be, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.phantom",
        description="Draw synthetic abdominal CT with exact label maps: "
        "DIR/images/NAME_0000.nii.gz and DIR/labels/NAME.nii.gz.",
    )
    count = _number(int, 1, "a whole number from 1")
    length = _number(float, 1e-3, "a length in mm")
    seed = _number(int, 0, "a whole number from 0")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--cases", type=count, default=4, metavar="N", help="phantoms to draw (default: 4)")
    add("--seed", type=seed, default=0, metavar="N", help="seed of the first (default: 0)")
    add("--slices", type=count, default=100, metavar="N", help="slices of each (default: 100)")
    add("--size", type=count, default=512, metavar="N", help="rows and columns (default: 512)")
    add(
        "--spacing", type=length, nargs=3, default=[0.8, 0.8, 2.5],
        metavar=("COLUMN", "ROW", "SLICE"),
        help="spacing in mm, as a NIfTI header has it (default: 0.8 0.8 2.5)",
    )  # fmt: skip
    add("--phase", choices=PHASES, help="contrast phase (default: drawn from each seed)")
    options = parser.parse_args(arguments)

    images, labels = options.output / "images", options.output / "labels"
    try:
        for folder in (images, labels):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: cannot make {error.filename}: {error.strerror}\n")
    shape = (options.slices, options.size, options.size)
    spacing = tuple(options.spacing[::-1])
    failed = 0
    for index in range(options.cases):
        start = time.monotonic()
        seed = options.seed + index
        name = f"phantom_{seed:04d}"
        phantom = draw_phantom(shape, spacing, seed, options.phase)
        try:
            write_nifti(images / f"{name}_0000.nii.gz", phantom.volume, spacing)
            write_nifti(labels / f"{name}.nii.gz", phantom.label_map, spacing)
        except OSError as error:
            failed += 1
            print(f"{name}: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
            continue
        print(
            f"[{index + 1}/{options.cases}] {name}  {'x'.join(map(str, shape))}  {phantom.phase}  "
            f"{time.monotonic() - start:.1f} s",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
