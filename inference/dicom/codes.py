"""What the labels are called in DICOM, and their colours."""

from dataclasses import dataclass
from functools import cache

from highdicom.color import CIELabColor
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from inference.colours import LABEL_COLOURS
from inference.labels import LABEL_NAMES, TUMOR

_KINDS = {
    "liver": codes.SCT.Liver,
    "kidney": codes.SCT.Kidney,
    "spleen": codes.SCT.Spleen,
    "pancreas": codes.SCT.Pancreas,
    "aorta": codes.SCT.Aorta,
    "inferior vena cava": codes.SCT.InferiorVenaCava,
    "adrenal gland": codes.SCT.AdrenalGland,
    "gallbladder": codes.SCT.Gallbladder,
    "esophagus": codes.SCT.Esophagus,
    "stomach": codes.SCT.Stomach,
    "duodenum": codes.SCT.Duodenum,
    "tumor": codes.SCT.Neoplasm,
}
_SIDES = {"right": codes.SCT.Right, "left": codes.SCT.Left}


@dataclass(frozen=True)
class LabelCode:
    """A label as DICOM names it.

    Attributes:
        category, kind: SNOMED CT codes, from the standard's own tables (PS3.16, by pydicom).
        side: SNOMED CT code of the laterality, of what there are two of.
        colour: CIELab, from the RGB of `colours.py`.
    """

    category: Code
    kind: Code
    side: Code | None
    colour: CIELabColor


@cache
def label_code(label: int) -> LabelCode:
    """The codes and the colour of a label, 1 to 14."""
    side, _, organ = LABEL_NAMES[label].partition(" ")
    name = organ if side in _SIDES else LABEL_NAMES[label]
    tissue = codes.SCT.MorphologicallyAbnormalStructure
    return LabelCode(
        category=tissue if label == TUMOR else codes.SCT.AnatomicalStructure,
        kind=_KINDS[name],
        side=_SIDES.get(side),
        colour=CIELabColor.from_rgb(*LABEL_COLOURS[label].tolist()),
    )
