"""Names of cases that tell nothing of the patient, and stay whatever else is found."""

import hashlib
import re
from collections import Counter
from pathlib import Path

from pydicom import Dataset

from inference.dicom.series import Series
from inference.dicom.slices import DicomFile, integer, text

IDENTITY = (
    *("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName"),
    *("PatientBirthDate", "PatientMotherBirthName", "AccessionNumber"),
    *("ReferringPhysicianName", "InstitutionName"),
)
"""Attributes whose words appear in no name."""

_DESCRIPTION = 40  # characters of a name


class Title:
    """What a series is called before it has a digest.

    Args:
        header: of one of its files.
        file: which.
        source: where it was found.
    """

    def __init__(self, header: Dataset, file: DicomFile, source: Path) -> None:
        self.number = integer(header, "SeriesNumber")
        self.description = text(header, "SeriesDescription")
        self.folder = (file.path / file.member).parent if file.member else file.path.parent
        if self.folder.is_relative_to(source) and self.folder != source:
            self.folder = self.folder.relative_to(source)
        else:
            self.folder = Path(self.folder.name)
        self.secret: set[str] = set()

    def of(self, names: str) -> str:
        """As `find_series` names cases: by "number", "uid" or "folder"."""
        if names == "uid":
            return "ct"
        if names == "folder":
            name = re.sub(r"[^\w.-]+", "_", "_".join(self.folder.parts)).strip("_.")
            return name or "series"
        known = self.number is not None and str(self.number) not in self.secret
        return "_".join(([str(self.number)] if known else []) + self._words()) or "series"

    def _words(self) -> list[str]:
        """The words of the description that say nothing of who the patient is."""
        words, length = [], 0
        for word in re.split(r"[\W_]+", self.description):
            lower = word.lower()
            tells = lower in self.secret or any(
                len(part) > 3 and part in lower for part in self.secret
            )
            if word and not tells and length + len(word) < _DESCRIPTION:
                words.append(word)
                length += len(word) + 1
        return words


def secret_words(header: Dataset) -> set[str]:
    """In small letters, what tells who the patient is."""
    secret = set()
    for keyword in IDENTITY:
        value = text(header, keyword).lower()
        secret |= {word for word in re.split(r"[\W_]+", value) if len(word) > 1}
        secret.add(re.sub(r"[\W_]+", "", value))
    return secret - {""}


def name_cases(series: list[Series], names: str) -> None:
    """Turn each case's title into a name that no other has.

    The UID's digest is in every name, so that a series keeps its name whatever lies beside it; but
    a folder that holds one series alone names it by itself.
    """
    titles = Counter((one.name, one.part) for one in series)
    taken = Counter()
    for one in series:
        title, lone = one.name, names == "folder" and titles[one.name, one.part] == 1
        part = f"_a{one.part}" if one.part else ""
        name = f"{title}{part}" if lone else f"{title}_{digest(one.uid, names)}{part}"
        taken[name] += 1
        one.name = name if taken[name] == 1 else f"{title}_{digest(one.uid, '')}{part}"


def digest(uid: str, names: str) -> str:
    """The part of a name that tells a series from all others; the whole digest for no way."""
    length = {"uid": 16, "number": 8, "folder": 8}.get(names)
    return hashlib.sha256(uid.encode()).hexdigest()[:length]
