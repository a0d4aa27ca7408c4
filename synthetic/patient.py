"""One patient from head to foot: every organ a list of solids, drawn at random from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from synthetic.body import ABDOMINAL, TRUNK, Layer, bowel, numbers, skeleton, spine
from synthetic.shapes import Ellipsoid, Solid, ellipsoid, tube
from synthetic.structures import NUMBERS


@dataclass(frozen=True)
class Patient:
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


def draw_patient(rng: np.random.Generator) -> Patient:
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
        ellipsoid((15, -12, -64), (right_top, 98, 82)),
        ellipsoid((15, -12, 64), (left_top, 98, 82)),
        ellipsoid((15, -12, 0), (72, 98, 100)),
    ]

    # Liver: what fills the right dome and reaches over to the left, cut by its visceral surface.
    right_lobe = ellipsoid(
        near((14, -12, -72)), np.array((right_top - 2, 81, 67)) * size(0.05), angles(0, 0, 0)
    )
    left_lobe = ellipsoid(near((48, -58, 8)), np.array((27, 33, 60)) * size(), angles(0, 0.1, 0))
    visceral = ((-1.0, 0.35, 0.62), 0.62 * -60 + 19 + rng.uniform(-6, 6))
    posterior = ((-0.6, 1.0, 0.6), rng.uniform(-3, 7))  # it lies in front of the kidney
    liver = [replace(lobe, planes=(visceral, posterior)) for lobe in (right_lobe, left_lobe)]

    kidneys = {}
    for side, s in ((-1, -36), (1, -20)):
        middle = near((s, 30, side * 69), 3.5)
        turn = angles(0, side * -0.22, 0.12, by=0.07)
        kidneys[side] = (
            ellipsoid(middle, np.array((53, 27, 28)) * size(), turn),
            ellipsoid(middle + np.array((0, -7, -side * 21)), np.array((19, 9, 15)) * size(), turn),
        )

    spleen = ellipsoid(
        near((28, 36, 101), 4), np.array((52, 52, 24)) * size(0.12), angles(-0.62, 0, 0.1)
    )

    stomach_path = path([(62, 14, 66), (35, -25, 78), (0, -58, 66), (-24, -70, 30), (-22, -64, -8)])
    pylorus = near((-17, -57, -31), 2)
    stomach = tube([*stomach_path, pylorus], np.array((28, 28, 25, 20, 14, 9)) * size(0.12))

    duodenum = tube(
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
    pancreas = tube(pancreas_path, np.array((14.5, 14.5, 9.5, 10.5, 11.5, 8.5)) * size(0.1))

    gallbladder = tube(
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
            plate = ellipsoid(ridge + 10 * reach * direction, extent, (turn, 0, 0))
            adrenals[side].append(plate)

    aorta_levels = (190, 150, 110, 70, 30, -10, -50, -105)
    bifurcation = near((-105, spine(-105) - 27, 5), 1.5)
    aorta = tube(
        [
            near((180, -42, -4), 1), near((202, -33, -4), 1), near((218, -8, 8), 1),
            *[
                near((s, spine(s) - 29 + max(0, s - 70) * 0.08, 11 + max(0, s - 30) * 0.06), 1)
                for s in aorta_levels[:-1]
            ],
            bifurcation,
        ],
        np.array((14, 14, 13, 12.5, 12, 11.5, 11.5, 11, 10.5, 10, 9)) * size(0.12),
    )  # fmt: skip
    confluence = near((-118, spine(-118) - 24, -14), 1)
    cava = tube(
        [
            confluence,
            *[near(x, 1) for x in ((-70, spine(-70) - 31, -18), (-30, spine(-30) - 34, -19))],
            *[
                near(x, 1)
                for x in ((10, -12, -21), (55, -14, -25), (95, -18, -24), (118, -24, -20))
            ],
        ],
        np.array((9, 10, 10.5, 11, 12, 12, 12)) * size(0.12),
    )
    esophagus = tube(
        [
            (310, 5, 0), (220, 8, 2), (150, 2, 0), *path([(100, -12, 6), (72, -20, 16)], 1.5),
            near((54, -16, 34), 1.5), stomach_path[0] + (-10, -14, -14),
        ],
        np.array((8, 8, 8, 8, 8.5, 9, 9)) * size(0.1),
    )  # fmt: skip

    arteries = tube(
        [(-8, -12, 9), (-30, -34, 7), (-100, -48, 2), (-170, -50, -25)], [4, 4, 3.5, 2.5]
    )
    arteries += tube([(12, -8, 9), (14, -30, 8), (16, -38, -10), (14, -48, -35)], [4, 3.5, 3, 2.5])
    veins = []
    for side in (-1, 1):
        iliac = ((-150, 12, side * 26), (-210, 2, side * 58), (-280, -28, side * 82))
        arteries += tube([bifurcation, *iliac], [7, 5.5, 5, 4.5])
        veins += tube(
            [confluence, *((s, p + 12, left - 4 * side) for s, p, left in iliac)], [8, 7, 6, 6]
        )
        renal = kidneys[side][1].centre
        veins += tube([renal, (renal[0] + 8, -10, side * 30), (-14, -22, -14)], [5, 5, 4.5])
    portal = tube(
        [(-160, -52, -30), (-75, -52, -10), (-22, -36, -12), (0, -34, -26), (16, -34, -48)],
        [3.5, 5, 6.5, 7, 7],
    )
    portal += tube([(-16, -34, -8), (2, -22, 36), (24, 4, 84)], [5, 4.5, 4])

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
        tumors.append((NUMBERS[host], ellipsoid(place, shape, rng.uniform(-1, 1, 3))))

    def organ(name: str, solids: list[Solid], gap: float = 0.0) -> Layer:
        return Layer(NUMBERS[name], solids, ABDOMINAL, gap)

    layers = [
        Layer(
            NUMBERS["visceral fat"],
            tube([(95, 0, 0), (300, -10, 0)], [36, 26]),  # mediastinum
            numbers("lung"),
        ),
        Layer(
            NUMBERS["heart"],
            [ellipsoid((136, -48, 22), (46, 44, 58), (0.5, 0.35, 0))],
            numbers("lung", "visceral fat"),
        ),
        *skeleton(),
        *bowel(near, rng),
        Layer(
            NUMBERS["urinary bladder"],
            [ellipsoid((-248, -15, 0), (32, 32, 42))],
            ABDOMINAL,
        ),
        organ("liver", liver, 1.5),
        organ("spleen", [spleen], 1.5),
        Layer(NUMBERS["esophagus"], esophagus, TRUNK, 1.5),
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
        Layer(NUMBERS["inferior vena cava"], cava, TRUNK, 1.2),
        Layer(NUMBERS["aorta"], aorta, TRUNK, 1.5),
        organ("right adrenal gland", adrenals[-1], 1.5),
        organ("left adrenal gland", adrenals[1], 1.5),
    ]
    return Patient(layers, tumors, centre, scale, fields, fat, domes)
