"""The scoring rules of the challenge: which labels, which tolerances, which years."""

from dataclasses import dataclass

from inference.labels import ORGANS, TUMOR

COLUMNS = (
    *("Liver", "RK", "Spleen", "Pancreas", "Aorta", "IVC", "RAG", "LAG", "Gallbladder"),
    *("Esophagus", "Stomach", "Duodenum", "LK", "Lesion"),
)
"""The official name of labels 1 to 14 in tables."""

SLICE_LIMITED = (5, 6, 10)
"""Aorta, inferior vena cava and esophagus are scored on the reference's labelled slices only."""


@dataclass(frozen=True)
class Protocol:
    """The scoring rules of one year.

    Attributes:
        name: as on the command line.
        tolerances_mm: label to the distance within which two surfaces agree; its keys are the
            labels scored.
        nsd_floor: NSD is set to 0 where DSC is below this.
    """

    name: str
    tolerances_mm: dict[int, float]
    nsd_floor: float


_ORGAN_TOLERANCES_MM = dict(zip(ORGANS, (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3), strict=True))

PROTOCOLS = {
    "flare23": Protocol("flare23", {**_ORGAN_TOLERANCES_MM, TUMOR: 2}, nsd_floor=0.2),
    "flare22": Protocol("flare22", _ORGAN_TOLERANCES_MM, nsd_floor=0.0),
}
"""FLARE 2023: 13 organs and tumor; its script's floor was 0.1 until March 2024, when the 2023
results were out, and 0.2 since. FLARE 2022: the same organs, numbers and tolerances; no floor."""
