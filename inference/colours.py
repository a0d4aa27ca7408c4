"""A colour for each label, in pictures and in the tables that viewers read.

The colours were chosen by search so that colour-blind readers can tell the organs apart as well:
any two differ, and neighbours in the body differ most, also as seen without one of the three kinds
of cones (simulated after Machado, Oliveira and Fernandes 2009; tests/inference/test_colours.py).
"""

from pathlib import Path

import numpy as np

from inference.files import write_atomically
from inference.labels import LABEL_NAMES

LABEL_COLOURS = np.array(
    [
        (0, 0, 0),
        (46, 209, 162),
        (209, 70, 139),
        (0, 0, 209),
        (162, 255, 255),
        (232, 23, 23),
        (46, 93, 255),
        (93, 23, 93),
        (209, 255, 185),
        (116, 0, 0),
        (255, 232, 0),
        (0, 93, 70),
        (255, 139, 46),
        (93, 139, 93),
        (185, 162, 232),
    ],
    np.uint8,
)
"""RGB of each label."""

SLICER_TABLE, ITK_SNAP_TABLE = "labels-3d-slicer.ctbl", "labels-itk-snap.txt"
"""The tables beside the label maps: load the one of your viewer with the label map."""


def write_colour_tables(folder: Path) -> None:
    """Write names and colours of all labels as 3D Slicer and ITK-SNAP read them.

    Slicer's has a line `number name R G B A` for each label (names without spaces), ITK-SNAP's
    `number R G B opacity visible mesh-visible "name"`.

    Raises:
        OSError: a table cannot be written.
    """
    slicer = ["# Color table file: number name R G B A"]
    itk_snap = ["# ITK-SNAP label description: number R G B opacity visible mesh name"]
    for label, (name, colour) in enumerate(zip(LABEL_NAMES, LABEL_COLOURS.tolist(), strict=True)):
        red, green, blue = colour
        shown = int(label > 0)
        slicer.append(f"{label} {name.replace(' ', '_')} {red} {green} {blue} {255 * shown}")
        itk_snap.append(f'{label} {red} {green} {blue} {shown} {shown} {shown} "{name}"')
    for table, lines in ((SLICER_TABLE, slicer), (ITK_SNAP_TABLE, itk_snap)):
        write_atomically(folder / table, ("\n".join(lines) + "\n").encode())
