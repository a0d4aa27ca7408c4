"""The labels' colours: one palette for pictures, legends and the tables that viewers read.

Chosen by search for the least difference (CIEDE2000) between labels over soft tissue, most of all
between those that lie near each other, for all eyes and for those without one kind of cones
(simulated after Machado, Oliveira and Fernandes 2009). tests/inference/test_colours.py has the
limits.
"""

from pathlib import Path

import numpy as np

from ..files import write_atomically
from ..labels import LABEL_NAMES

LABEL_COLOURS = np.array(
    [
        (0, 0, 0),
        (96, 64, 128),  # liver
        (255, 32, 255),  # right kidney
        (32, 128, 191),  # spleen
        (159, 0, 0),  # pancreas
        (255, 32, 0),  # aorta
        (0, 0, 255),  # inferior vena cava
        (0, 255, 255),  # right adrenal gland
        (128, 0, 159),  # left adrenal gland
        (32, 128, 64),  # gallbladder
        (191, 159, 255),  # esophagus
        (255, 223, 0),  # stomach
        (159, 255, 128),  # duodenum
        (0, 223, 128),  # left kidney
        (255, 128, 0),  # tumor
    ],
    np.uint8,
)
"""RGB of each label."""

SOFT_TISSUE_HU = (-160.0, 240.0)
"""The window of pictures, HU: a width of 400 around 40."""

_OPACITY = 0.6
_ORGAN_HU = 60.0  # of most organs


def overlay(hu: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    """Return slices as a picture in the soft-tissue window, with the labels over them.

    HU and integers of any one shape become RGB, uint8, (*shape, 3); NaN is black.
    """
    low, high = SOFT_TISSUE_HU
    grey = np.clip(np.nan_to_num((hu - low) / (high - low)), 0, 1) * 255
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    over = label_map != 0
    rgb[over] += _OPACITY * (LABEL_COLOURS[label_map[over]] - rgb[over])
    return rgb.astype(np.uint8)


LEGEND_COLOURS = overlay(np.full(len(LABEL_NAMES), _ORGAN_HU), np.arange(len(LABEL_NAMES)))
"""RGB of each label as `overlay` shows it on an organ: for legends and curves."""

SLICER_TABLE, ITK_SNAP_TABLE = "labels-3d-slicer.ctbl", "labels-itk-snap.txt"
"""The tables beside the label maps: load the one of your viewer with the label map."""


def write_colour_tables(folder: Path) -> None:
    """Write names and colours of all labels as 3D Slicer and ITK-SNAP read them.

    Slicer's has a line `number name R G B A` for each label (names without spaces), ITK-SNAP's
    `number R G B opacity visible mesh-visible "name"`.
    """
    slicer = ["# Color table file: number name R G B A"]
    itk_snap = ["# ITK-SNAP label description: number R G B opacity visible mesh name"]
    for label, (name, colour) in enumerate(zip(LABEL_NAMES, LABEL_COLOURS.tolist(), strict=True)):
        red, green, blue = colour
        shown = int(label > 0)
        slicer.append(f"{label} {name.replace(' ', '_')} {red} {green} {blue} {255 * shown}")
        itk_snap.append(f'{label} {red} {green} {blue} {shown} {shown} {shown} "{name}"')
    for table, lines in ((SLICER_TABLE, slicer), (ITK_SNAP_TABLE, itk_snap)):
        write_atomically(folder / table, "\n".join(lines) + "\n")
