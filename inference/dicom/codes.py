"""The labels' codes and colours in DICOM."""

from dataclasses import dataclass
from functools import cache

from highdicom.color import CIELabColor
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from ..labels import LABEL_NAMES, TUMOR
from ..records.colours import LABEL_COLOURS

_SIDES = {"right": codes.SCT.Right, "left": codes.SCT.Left}


@dataclass(frozen=True)
class LabelCode:
    """A label's codes and colour.

    Attributes:
        category, kind: SNOMED CT codes, from the standard's own tables (PS3.16, by pydicom).
        side: SNOMED CT code of the laterality, of paired organs.
        colour: CIELab, from the RGB of `colours.py`.
    """

    category: Code
    kind: Code
    side: Code | None
    colour: CIELabColor


@cache
def label_code(label: int) -> LabelCode:
    """Return the codes and the colour of a label, 1 to 14."""
    side, _, organ = LABEL_NAMES[label].partition(" ")
    name = "neoplasm" if label == TUMOR else organ if side in _SIDES else LABEL_NAMES[label]
    tissue = codes.SCT.MorphologicallyAbnormalStructure
    return LabelCode(
        category=tissue if label == TUMOR else codes.SCT.AnatomicalStructure,
        kind=getattr(codes.SCT, name.title().replace(" ", "")),
        side=_SIDES.get(side),
        colour=CIELabColor.from_rgb(*LABEL_COLOURS[label].tolist()),
    )
