"""One patient from head to foot: every organ a list of solids, drawn at random from a seed.

Points are (superior, posterior, left) in mm; a side is -1 for right and 1 for left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from synthetic.body import ABDOMINAL, TRUNK, Layer, bowel, numbers, skeleton, spine
from synthetic.shapes import Ellipsoid, Solid, ellipsoid, tube
from synthetic.structures import NUMBERS

_SIDES = (-1, 1)


@dataclass(frozen=True)
class Patient:
    """Everything random about a patient's anatomy, independent of the grid."""

    layers: list[Layer]  # to draw one after another
    tumors: list[tuple[int, Solid]]  # the number of each one's host, and its shape
    centre: np.ndarray  # of the field of view, mm
    scale: np.ndarray  # size along each axis
    # Of the deformation: control displacements (3, n, n, n) in mm and their step in mm.
    fields: list[tuple[np.ndarray, float]]
    fat: tuple[float, float, float]  # subcutaneous, mm: anterior, posterior, at the sides
    domes: list[Ellipsoid]  # of the diaphragm: right, left and middle


@dataclass(frozen=True)
class _Chance:
    """What is random about a patient, from one generator."""

    rng: np.random.Generator

    def near(self, point: ArrayLike, by: float = 2.5) -> np.ndarray:
        return np.asarray(point, float) + self.rng.uniform(-by, by, 3)

    def size(self, by: float = 0.08) -> float:
        return float(self.rng.uniform(1 - by, 1 + by))

    def angles(self, *mean: float, by: float = 0.1) -> np.ndarray:
        return np.asarray(mean) + self.rng.uniform(-by, by, 3)

    def path(self, points: Sequence[ArrayLike], by: float = 2.5) -> list[np.ndarray]:
        shift = self.rng.uniform(-by, by, 3)
        return [self.near(point, by) + shift for point in points]


def _domes(chance: _Chance) -> list[Ellipsoid]:
    right, left = chance.rng.uniform(84, 96), chance.rng.uniform(72, 84)
    return [
        ellipsoid((15, -12, -64), (right, 98, 82)),
        ellipsoid((15, -12, 64), (left, 98, 82)),
        ellipsoid((15, -12, 0), (72, 98, 100)),
    ]


def _liver(chance: _Chance, dome: Ellipsoid) -> list[Ellipsoid]:
    """Return right and left lobe: what fills the right dome and reaches over to the left."""
    right_lobe = ellipsoid(
        chance.near((14, -12, -72)),
        np.array((dome.semi_axes[0] - 2, 81, 67)) * chance.size(0.05),
        chance.angles(0, 0, 0),
    )
    left_lobe = ellipsoid(
        chance.near((48, -58, 8)), np.array((27, 33, 60)) * chance.size(), chance.angles(0, 0.1, 0)
    )
    visceral = ((-1.0, 0.35, 0.62), 0.62 * -60 + 19 + chance.rng.uniform(-6, 6))
    posterior = ((-0.6, 1.0, 0.6), chance.rng.uniform(-3, 7))  # it lies in front of the kidney
    return [replace(lobe, planes=(visceral, posterior)) for lobe in (right_lobe, left_lobe)]


def _kidney(chance: _Chance, side: int) -> tuple[Ellipsoid, Ellipsoid]:
    """Return a kidney and its sinus."""
    middle = chance.near((-36 if side < 0 else -20, 30, side * 69), 3.5)
    turn = chance.angles(0, side * -0.22, 0.12, by=0.07)
    return (
        ellipsoid(middle, np.array((53, 27, 28)) * chance.size(), turn),
        ellipsoid(
            middle + np.array((0, -7, -side * 21)), np.array((19, 9, 15)) * chance.size(), turn
        ),
    )


def _spleen(chance: _Chance) -> Ellipsoid:
    return ellipsoid(
        chance.near((28, 36, 101), 4),
        np.array((52, 52, 24)) * chance.size(0.12),
        chance.angles(-0.62, 0, 0.1),
    )


def _stomach(chance: _Chance) -> tuple[list[Solid], np.ndarray, np.ndarray]:
    """Return the stomach, its upper end and the pylorus."""
    path = chance.path([(62, 14, 66), (35, -25, 78), (0, -58, 66), (-24, -70, 30), (-22, -64, -8)])
    pylorus = chance.near((-17, -57, -31), 2)
    radii = np.array((28, 28, 25, 20, 14, 9)) * chance.size(0.12)
    return tube([*path, pylorus], radii), path[0], pylorus


def _duodenum(chance: _Chance, pylorus: np.ndarray) -> list[Solid]:
    path = [
        (-14, -42, -50), (-42, -34, -57), (-66, -38, -48), (-76, -46, -20), (-70, -46, 12),
        (-50, -40, 34),
    ]  # fmt: skip
    points = [pylorus + np.array((0, 3, -3)), *chance.path(path, 2)]
    return tube(points, np.array((9, 12, 12, 12, 11, 11, 10)) * chance.size(0.1))


def _pancreas(chance: _Chance) -> tuple[list[Solid], np.ndarray]:
    """Return the pancreas and the middle of its head."""
    head = chance.near((-40, -40, -27), 2)
    path = [head, *chance.path([(-20, -42, -20), (-4, -44, 4), (4, -30, 34)], 2)]
    path += chance.path([(12, -14, 62), (20, -2, 84)], 2)
    return tube(path, np.array((14.5, 14.5, 9.5, 10.5, 11.5, 8.5)) * chance.size(0.1)), head


def _gallbladder(chance: _Chance) -> list[Solid]:
    path = chance.path([(-8, -38, -56), (-20, -54, -66), (-32, -72, -74)])
    return tube(path, np.array((6, 13, 14)) * chance.size(0.2))


def _adrenal_gland(chance: _Chance, side: int, ridge: np.ndarray) -> list[Ellipsoid]:
    """Return a ridge with two limbs behind it: plates that meet at the ridge."""
    plates = []
    for slope, reach in ((-0.25, 1.0), (0.55, 1.0), (0.1, -0.55)):
        turn = side * slope + chance.rng.uniform(-0.08, 0.08)
        direction = np.array((-0.12, np.cos(turn), np.sin(turn)))
        extent = np.array((14.5, 11.0 * max(abs(reach), 0.7), 2.7)) * chance.size(0.06)
        plates.append(ellipsoid(ridge + 10 * reach * direction, extent, (turn, 0, 0)))
    return plates


def _aorta(chance: _Chance) -> tuple[list[Solid], np.ndarray]:
    """Return the aorta and its bifurcation."""
    bifurcation = chance.near((-105, spine(-105) - 27, 5), 1.5)
    arch = ((180, -42, -4), (202, -33, -4), (218, -8, 8))
    levels = (190, 150, 110, 70, 30, -10, -50)
    descending = [
        (s, spine(s) - 29 + max(0, s - 70) * 0.08, 11 + max(0, s - 30) * 0.06) for s in levels
    ]
    points = [*(chance.near(point, 1) for point in (*arch, *descending)), bifurcation]
    radii = np.array((14, 14, 13, 12.5, 12, 11.5, 11.5, 11, 10.5, 10, 9))
    return tube(points, radii * chance.size(0.12)), bifurcation


def _vena_cava(chance: _Chance) -> tuple[list[Solid], np.ndarray]:
    """Return the inferior vena cava and its lower end."""
    confluence = chance.near((-118, spine(-118) - 24, -14), 1)
    path = [
        (-70, spine(-70) - 31, -18), (-30, spine(-30) - 34, -19), (10, -12, -21), (55, -14, -25),
        (95, -18, -24), (118, -24, -20),
    ]  # fmt: skip
    points = [confluence, *(chance.near(point, 1) for point in path)]
    return tube(points, np.array((9, 10, 10.5, 11, 12, 12, 12)) * chance.size(0.12)), confluence


def _esophagus(chance: _Chance, cardia: np.ndarray) -> list[Solid]:
    upper = [(310, 5, 0), (220, 8, 2), (150, 2, 0)]
    lower = [*chance.path([(100, -12, 6), (72, -20, 16)], 1.5), chance.near((54, -16, 34), 1.5)]
    points = [*map(np.array, upper), *lower, cardia - (10, 14, 14)]
    return tube(points, np.array((8, 8, 8, 8, 8.5, 9, 9)) * chance.size(0.1))


def _vessels(
    bifurcation: np.ndarray, confluence: np.ndarray, sinuses: Sequence[Ellipsoid]
) -> tuple[list[Solid], list[Solid], list[Solid]]:
    """Return arteries and veins of gut, kidneys and legs, and the portal vein."""
    arteries = tube(
        [(-8, -12, 9), (-30, -34, 7), (-100, -48, 2), (-170, -50, -25)], [4, 4, 3.5, 2.5]
    )
    arteries += tube([(12, -8, 9), (14, -30, 8), (16, -38, -10), (14, -48, -35)], [4, 3.5, 3, 2.5])
    veins: list[Solid] = []
    for side, sinus in zip(_SIDES, sinuses, strict=True):
        iliac = ((-150, 12, side * 26), (-210, 2, side * 58), (-280, -28, side * 82))
        arteries += tube([bifurcation, *iliac], [7, 5.5, 5, 4.5])
        veins += tube(
            [confluence, *((s, p + 12, left - 4 * side) for s, p, left in iliac)], [8, 7, 6, 6]
        )
        renal = sinus.centre
        veins += tube([renal, (renal[0] + 8, -10, side * 30), (-14, -22, -14)], [5, 5, 4.5])
    portal = tube(
        [(-160, -52, -30), (-75, -52, -10), (-22, -36, -12), (0, -34, -26), (16, -34, -48)],
        [3.5, 5, 6.5, 7, 7],
    )
    portal += tube([(-16, -34, -8), (2, -22, 36), (24, 4, 84)], [5, 4.5, 4])
    return arteries, veins, portal


def _tumors(
    chance: _Chance, right_lobe: Ellipsoid, kidneys: Sequence[Ellipsoid], head: np.ndarray
) -> list[tuple[int, Solid]]:
    """Return lesions and their hosts' numbers, away from where they could cut a host in two."""
    rng = chance.rng
    tumors: list[tuple[int, Solid]] = []
    hosts = ["liver", *rng.choice(("liver", "right kidney", "left kidney", "pancreas"), 3).tolist()]
    first = int(rng.integers(4))
    for host in (hosts[first:] + hosts[:first])[: int(rng.integers(1, 5))]:
        if host == "liver":
            away = rng.uniform(-0.55, 0.55, 3) * right_lobe.semi_axes
            place, radius = np.array((32, -10, -78)) + away * (0.5, 1, 0.75), rng.uniform(7, 24)
        elif host == "pancreas":
            place, radius = head - np.array((4, 3, 0)), rng.uniform(6, 9)
        else:
            kidney = kidneys[host == "left kidney"]
            pole = rng.choice((-1, 1)) * 0.68 * kidney.semi_axes[0]
            place = kidney.centre + kidney.axes[0] * pole + (0, 0, np.sign(kidney.centre[2]) * 5)
            radius = rng.uniform(6, 14)
        shape = radius * rng.uniform(0.8, 1.2, 3)
        tumors.append((NUMBERS[host], ellipsoid(place, shape, rng.uniform(-1, 1, 3))))
    return tumors


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw a patient; the number of random draws does not depend on any grid."""
    chance = _Chance(rng)
    scale = rng.uniform(0.94, 1.06) * rng.uniform(0.97, 1.03, 3)
    centre = np.array([5.0, 0.0, 0.0]) + rng.uniform(-1, 1, 3) * (4, 8, 8)
    steps = ((75.0, 9, 20.0), (26.0, 25, 5.0))  # (step mm, control points per axis, limit mm)
    fields = [
        (rng.uniform(-limit, limit, (3, n, n, n)).astype(np.float32), step)
        for step, n, limit in steps
    ]
    fat = float(rng.uniform(4, 24))
    anterior, posterior, side = (chance.size(0.3) for _ in range(3))
    fat_mm = fat * anterior, 6 + 0.5 * fat * posterior, 3 + 0.6 * fat * side

    domes = _domes(chance)
    liver = _liver(chance, domes[0])
    kidneys, sinuses = zip(*(_kidney(chance, side) for side in _SIDES), strict=True)
    spleen = _spleen(chance)
    stomach, cardia, pylorus = _stomach(chance)
    duodenum = _duodenum(chance, pylorus)
    pancreas, head = _pancreas(chance)
    gallbladder = _gallbladder(chance)
    ridges = chance.near((22, 2, -33), 1.5), chance.near((20, 0, 40), 1.5)
    right_adrenal, left_adrenal = (
        _adrenal_gland(chance, side, ridge) for side, ridge in zip(_SIDES, ridges, strict=True)
    )
    aorta, bifurcation = _aorta(chance)
    cava, confluence = _vena_cava(chance)
    esophagus = _esophagus(chance, cardia)
    arteries, veins, portal = _vessels(bifurcation, confluence, sinuses)
    tumors = _tumors(chance, liver[0], kidneys, head)

    def organ(name: str, solids: Sequence[Solid], gap: float = 0.0) -> Layer:
        return Layer(NUMBERS[name], solids, ABDOMINAL, gap)

    mediastinum = tube([(95, 0, 0), (300, -10, 0)], [36, 26])
    heart = ellipsoid((136, -48, 22), (46, 44, 58), (0.5, 0.35, 0))
    layers = [
        Layer(NUMBERS["visceral fat"], mediastinum, numbers("lung")),
        Layer(NUMBERS["heart"], [heart], numbers("lung", "visceral fat")),
        *skeleton(),
        *bowel(chance.near, rng),
        organ("urinary bladder", [ellipsoid((-248, -15, 0), (32, 32, 42))]),
        organ("liver", liver, 1.5),
        organ("spleen", [spleen], 1.5),
        Layer(NUMBERS["esophagus"], esophagus, TRUNK, 1.5),
        organ("stomach", stomach, 1.2),
        organ("right kidney", [kidneys[0]], 3.5),
        organ("left kidney", [kidneys[1]], 3.5),
        organ("visceral fat", sinuses),
        organ("veins", veins),
        organ("arteries", arteries, 1.0),
        organ("portal vein", portal),
        organ("duodenum", duodenum, 1.0),
        organ("pancreas", pancreas, 1.0),
        organ("gallbladder", gallbladder, 0.8),
        Layer(NUMBERS["inferior vena cava"], cava, TRUNK, 1.2),
        Layer(NUMBERS["aorta"], aorta, TRUNK, 1.5),
        organ("right adrenal gland", right_adrenal, 1.5),
        organ("left adrenal gland", left_adrenal, 1.5),
    ]
    return Patient(layers, tumors, centre, scale, fields, fat_mm, domes)
