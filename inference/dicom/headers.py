"""Correct what a DICOM SEG copies from its source's header: text and what can be parsed."""

import re

from highdicom.enum import PatientSexValues
from pydicom import Dataset, config
from pydicom.charset import convert_encodings, python_encoding
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.multival import MultiValue
from pydicom.valuerep import DA, DT, TM, validate_value

_TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)
"""Attributes that must be there, empty if unknown; not every file has them."""

_PARSERS = {"DA": DA, "TM": TM, "DT": DT, "DS": float, "IS": int}
_FUNCTIONAL_GROUPS = 0x5200  # long, and copied by no SEG


def correct(header: Dataset) -> list[str]:
    """Decode a header's text, to be written as UTF-8, and remove or empty what cannot be parsed.

    Returns:
        Keywords of the patient's and the study's attributes that lost their value or a character.
    """
    wrong = _correct(header, convert_encodings(None))
    header.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _TYPE_2:
        if keyword not in header:
            setattr(header, keyword, "")
    return [word for word in dict.fromkeys(wrong) if word in _TYPE_2 or word.startswith("Patient")]


def _correct(dataset: Dataset, encodings: list[str]) -> list[str]:
    """Decode a data set and its items, and remove what cannot be parsed; return the keywords."""
    if "SpecificCharacterSet" in dataset:
        encodings = _encodings(dataset.SpecificCharacterSet or "")
        del dataset.SpecificCharacterSet
    implicit, little_endian = dataset.original_encoding
    dataset.set_original_encoding(implicit, little_endian, encodings)
    wrong = []
    for tag in sorted(dataset.keys()):
        if tag.group >= _FUNCTIONAL_GROUPS:
            break
        keyword = keyword_for_tag(tag)
        try:
            element = dataset[tag]
            if element.VR == "SQ":
                for item in element.value:
                    wrong += _correct(item, encodings)
            elif keyword and not element.is_empty:
                _check(keyword, element.value)
                if "\ufffd" in str(element.value):
                    wrong.append(keyword)
        except Exception:
            del dataset[tag]
            wrong.append(keyword)
    return wrong


def _encodings(terms: str | MultiValue) -> list[str]:
    """Return Python's names of character sets, misspelt ones corrected."""
    corrected = []
    for term in [terms] if isinstance(terms, str) else terms:
        number = "".join(re.findall(r"IR\D*(\d+)\W*$", term, re.IGNORECASE))
        legal = "ISO_IR 192" if number == "192" else f"ISO 2022 IR {number}"
        corrected.append(legal if legal in python_encoding else term)
    return convert_encodings(corrected)


def _check(keyword: str, value: object) -> None:
    """Raise an error if a value is not of its attribute's type; text may be of any length."""
    vr = dictionary_VR(keyword)
    if keyword == "PatientSex":
        PatientSexValues(value)
    for one in value if isinstance(value, MultiValue) and keyword not in _TYPE_2 else [value]:
        if vr in _PARSERS:
            _PARSERS[vr](one)
        elif vr in ("AS", "CS"):
            validate_value(vr, one, config.RAISE)
