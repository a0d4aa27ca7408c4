"""The frame of the body: its walls and spine, skeleton, muscles and bowel."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from inference.labels import LABEL_NAMES
from synthetic.shapes import Solid, ellipsoid, tube
from synthetic.structures import NUMBERS

_SPINE_S = (-330, -260, -200, -137, -104, -68, 0, 60, 120, 190, 300)

_SPINE_P = (85, 75, 55, 24, 14, 15, 30, 40, 46, 48, 30)

TAPER_S = (-420, -300, -200, -120, -60, 70, 140, 200, 250, 285, 320, 420)

TAPER_BODY = (0.8, 0.95, 1.05, 1.0, 1.0, 1.0, 0.98, 0.93, 0.85, 0.7, 0.5, 0.45)

TAPER_CAVITY = (0.0, 0.0, 0.72, 0.93, 1.0, 1.0, 0.95, 0.85, 0.65, 0.35, 0.0, 0.0)

CAVITY_CENTRE, CAVITY_AXES = (-12.0, 0.0), (95.0, 136.0)

WALL_CENTRE, WALL_AXES = (-2.0, 0.0), (112.0, 149.0)

SQUARENESS = 0.5


def spine(superior: float) -> float:
    """Return how far posterior the vertebral bodies' axis lies at a level, mm."""
    return float(np.interp(superior, _SPINE_S, _SPINE_P))


class Layer(NamedTuple):
    """Solids of one structure, and what they may cover: (256,) bool by number.

    A positive `gap` first clears that many mm around them to visceral fat.
    """

    number: int
    solids: Sequence[Solid]
    over: np.ndarray
    gap: float = 0.0


def numbers(*names: str) -> np.ndarray:
    """Return (256,) bool: True at the numbers of the structures named."""
    chosen = np.zeros(256, bool)
    chosen[[NUMBERS[name] for name in names]] = True
    return chosen


ABDOMINAL = numbers(
    "visceral fat", "small bowel wall", "small bowel content", "colon wall", "colon content",
    "bowel gas", "portal vein", "arteries", "veins", *LABEL_NAMES[1:],
)  # fmt: skip

TRUNK = ABDOMINAL | numbers("lung", "heart", "muscle")

_SOLID_BODY = numbers("muscle", "visceral fat", "subcutaneous fat", "lung")


def _outline(theta: float, thickness: float, superior: float) -> tuple[float, float, float]:
    """Return a point `thickness` mm outside the cavity at an angle (0 posterior, π/2 left), mm."""
    sine, cosine = np.sin(theta), np.cos(theta)
    product = SQUARENESS * (sine * cosine) ** 2
    reach = 1.0 if product < 1e-9 else np.sqrt((1 - np.sqrt(1 - 4 * product)) / (2 * product))
    taper = float(np.interp(superior, TAPER_S, TAPER_CAVITY))
    posterior, left = (a * taper + thickness for a in CAVITY_AXES)
    return superior, CAVITY_CENTRE[0] + posterior * reach * cosine, left * reach * sine


def _mirrored(side: int, *points: tuple[float, float, float]) -> np.ndarray:
    """Return points of the left side on a side, -1 for right and 1 for left."""
    return np.array(points) * (1, 1, side)


def skeleton() -> list[Layer]:
    """Return spine, ribs and pelvis, and the muscles beside the spine."""
    muscles: list[Solid] = []
    vertebrae: list[Solid] = []
    ribs: list[Solid] = []
    pelvis: list[Solid] = []
    column = range(-250, 320, 15)
    discs = tube([(s, spine(s), 0) for s in column], [17 if s < 60 else 14 for s in column])
    canal = tube([(s, spine(s) + 26, 0) for s in column if s > -210], [7.5] * 35)
    muscles += tube([(s, min(spine(s) + 42, 80), 0) for s in column], [20 for _ in column])
    for side in (-1, 1):
        beside = [(s, min(spine(s) + 50, 84), side * 34) for s in column]
        muscles += tube(beside, [24 if s < 150 else 18 for s in column])
        psoas = _mirrored(side, (10, 34, 26), (-60, 18, 34), (-140, 8, 48), (-260, -5, 80))
        muscles += tube(psoas, [6, 15, 21, 20])
        for depth in np.linspace(0, 1, 7):
            iliac_wing = _mirrored(
                side,
                (-135 - 75 * depth, 20 - 40 * (1 - depth), 128 - 25 * depth),
                (-145 - 60 * depth, 55, 90 - 20 * depth),
                (-165 - 30 * depth, 68, 50 - 5 * depth),
            )
            pelvis += tube(iliac_wing, [5, 6, 7])
        femur = _mirrored(side, (-205, 15, 98), (-245, 5, 88), (-300, 0, 80), (-600, 5, 80))
        pelvis += tube(femur, [14, 24, 16, 14])
    pelvis += tube([(-160, spine(-160), 0), (-240, 82, 0)], [20, 9])
    for level in (*range(-137, 0, 34), *range(0, 300, 30)):
        axis, width, half = (spine(level), *((23, 13) if level < 60 else (18, 11)))
        body = ellipsoid((level, axis, 0), (30, width * 0.8, width))
        planes = (((1, 0, 0), level + half), ((-1, 0, 0), half - level))
        vertebrae.append(replace(body, planes=planes))
        vertebrae += tube([(level, axis + 38, 0), (level - 10, axis + 55, 0)], [6, 4])
        for side in (-1, 1):
            root, end = (level, axis + 27, 16), (level, axis + 32, 38)
            arch = _mirrored(side, (level, axis + 12, 15), root, (level, axis + 38, 0))
            vertebrae += tube(arch, [6, 6, 5])
            vertebrae += tube(_mirrored(side, root, end), [5, 3])
    for number, level in enumerate(range(30, 300, 30)):
        reach = np.radians((60, 88, 120, 128, 135)[min(number, 4)])
        for side in (-1, 1):
            angles = np.linspace(np.radians(28), reach, 9)
            drop = np.degrees(angles - angles[0]) * 0.55
            path = [_outline(side * a, 7, level - d) for a, d in zip(angles, drop, strict=True)]
            ribs += tube(path, [4.5] * len(path), step=14)
    front = [_outline(np.pi, 6, s) for s in range(100, 280, 20)]
    ribs += tube(front, [6] * len(front))
    discs_too = _SOLID_BODY | numbers("intervertebral disc")
    return [
        Layer(NUMBERS["muscle"], muscles, _SOLID_BODY),
        Layer(NUMBERS["intervertebral disc"], discs, _SOLID_BODY),
        Layer(NUMBERS["pelvis"], pelvis, _SOLID_BODY),
        Layer(NUMBERS["rib"], ribs, _SOLID_BODY),
        Layer(NUMBERS["vertebra"], vertebrae, discs_too),
        Layer(NUMBERS["spinal canal"], canal, discs_too | numbers("vertebra", "pelvis")),
    ]


def bowel(near: Callable[..., np.ndarray], rng: np.random.Generator) -> list[Layer]:
    """Return loops of small bowel and the frame of the colon; `near` shakes a point."""
    loops = []
    for row, s in enumerate(range(-45, -250, -27)):
        columns = np.arange(-78, 79, 26)[:: 1 if row % 2 else -1]
        loops += [
            near((s, p, column), 7)
            for k, column in enumerate(columns)
            for p in (-28, -54, -80)[:: 1 if k % 2 else -1]
        ]
    radii = rng.uniform(9.5, 13.5, len(loops))
    small = tube(loops, radii)
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
    colon = tube(list(frame), calibre)
    gas = [part.grown(-4.0) for part in colon if rng.random() < 0.45]
    layers = [
        ("small bowel wall", small, ["visceral fat"]),
        ("small bowel content", [part.grown(-2.5) for part in small], ["small bowel wall"]),
        ("colon wall", colon, ["visceral fat", "small bowel wall", "small bowel content"]),
        ("colon content", [part.grown(-2.5) for part in colon], ["colon wall"]),
        ("bowel gas", gas, ["colon content"]),
    ]
    return [Layer(NUMBERS[name], solids, numbers(*over)) for name, solids, over in layers]
