"""Name cases without identifying the patient, and the same whatever else is found."""

import hashlib
import re
from collections import Counter
from pathlib import Path

from pydicom import Dataset

from .series import Series
from .slices import text

IDENTITY = (
    *("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName"),
    *("PatientBirthDate", "PatientMotherBirthName", "AccessionNumber"),
    *("ReferringPhysicianName", "InstitutionName"),
)
"""Attributes whose words appear in no name and no message."""

_DESCRIPTION = 40  # characters of a name


def identifying_words(header: Dataset) -> set[str]:
    """Return the words that identify the patient, in lower case."""
    words = set()
    for keyword in IDENTITY:
        value = text(header, keyword).lower()
        words |= {word for word in re.split(r"[\W_]+", value) if len(word) > 1}
        words.add(re.sub(r"[\W_]+", "", value))
    return words - {""}


def title(
    number: int | None, description: str, folder: Path, identifying: set[str], names: str
) -> str:
    """Return a case's name before its digest, by `--names`.

    Args:
        number, description: of the series.
        folder: of one of its files, relative to the input.
        identifying: words that must not appear.
        names: "number", "uid" or "folder".
    """
    if names == "uid":
        return "ct"
    if names == "folder":
        return re.sub(r"[^\w.-]+", "_", "_".join(folder.parts)).strip("_.") or "series"
    words = [] if number is None or str(number) in identifying else [str(number)]
    length = 0
    for word in re.split(r"[\W_]+", description):
        lower = word.lower()
        identifies = lower in identifying or any(
            len(part) > 2 and part in lower for part in identifying
        )
        if word and not identifies and length + len(word) < _DESCRIPTION:
            words.append(word)
            length += len(word) + 1
    return "_".join(words) or "series"


def name_cases(series: list[Series], names: str) -> None:
    """Turn each case's title into a unique name, by `--names`.

    The UID's digest is in every name, so that a series has the same name whatever lies beside it;
    but a folder that holds one series alone names it by itself.
    """
    titles = Counter((one.name, one.part) for one in series)
    taken: Counter[str] = Counter()
    for one in series:
        part = f"_a{one.part}" if one.part else ""
        unique = names == "folder" and titles[one.name, one.part] == 1
        name = f"{one.name}{part}" if unique else f"{one.name}_{digest(one.uid, names)}{part}"
        taken[name] += 1
        one.name = name if taken[name] == 1 else f"{one.name}_{digest(one.uid, '')}{part}"


def digest(uid: str, names: str) -> str:
    """Return the part of a name that distinguishes a series, by `--names`; by "" all of it."""
    length = {"uid": 16, "number": 8, "folder": 8}.get(names)
    return hashlib.sha256(uid.encode()).hexdigest()[:length]
