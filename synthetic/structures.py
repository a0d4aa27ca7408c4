"""The structures of a synthetic abdomen: their numbers, and how each looks in HU by phase."""

from typing import NamedTuple

PHASES = ("non-contrast", "arterial", "portal-venous", "delayed")
"""Contrast phases, in the order of the ranges in `STRUCTURES`."""

Range = tuple[float, float]


class Structure(NamedTuple):
    """What a number of the anatomy is and how it looks."""

    name: str
    hu: tuple[Range, Range, Range, Range]  # of its mean in each of `PHASES`; drawn uniformly
    texture: float  # standard deviation of the smooth variation inside it, HU


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

ALIKE = (
    ("right kidney", "left kidney"),
    ("right adrenal gland", "left adrenal gland"),
    ("aorta", "arteries"),
    ("inferior vena cava", "veins"),
)

GAS = -900.0
