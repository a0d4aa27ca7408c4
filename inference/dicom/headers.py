"""Correct what a DICOM SEG copies from its source's header: all values get a legal form."""

import re
from typing import Any

from highdicom.enum import PatientSexValues
from pydicom import Dataset, config
from pydicom.charset import convert_encodings, python_encoding
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.multival import MultiValue
from pydicom.valuerep import DA, DT, IS, MAX_VALUE_LEN, TM, DSfloat, validate_value

_TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)
"""Attributes that must be there, empty if unknown; not every file has them."""

_PARSERS = {"DA": DA, "TM": TM, "DT": DT}
_TEXT = ("SH", "LO", "ST", "LT")
_NAME_CHARACTERS, _NAME_PARTS, _NAME_FORMS = 64, 5, 3  # in a form; in a form; of a name
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")

REFERENCES = ("StudyInstanceUID", "FrameOfReferenceUID")
"""UIDs by which the SEG belongs to its source; they are copied as they are."""
_COPIED = (*REFERENCES, "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_FUNCTIONAL_GROUPS = 0x5200  # long, and copied by no SEG


def correct(header: Dataset) -> list[str]:
    """Decode a header's text, to be written as UTF-8; shorten, empty or remove what is not legal.

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
    """Decode a data set and its items, and make them legal; return the keywords that changed."""
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
            elif keyword and not element.is_empty and keyword not in _COPIED:
                before = str(element.value)
                element.value = _legal(keyword, element.value)
                if str(element.value) != before or "\ufffd" in before:
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


def _legal(keyword: str, value: Any) -> Any:  # noqa: ANN401  (as pydicom types it)
    """Return a value in the form that its attribute's type has; raise an error if there is none."""
    vr = dictionary_VR(keyword)
    if isinstance(value, MultiValue) and (vr in ("PN", "LO", "SH") or keyword not in _TYPE_2):
        return [_legal(keyword, one) for one in value]
    if vr == "PN":
        return "=".join(map(_legal_name, str(value).split("=")[:_NAME_FORMS]))
    if vr in _TEXT:
        text = str(value) if vr in ("ST", "LT") else _CONTROL.sub(" ", str(value))
        return text[: MAX_VALUE_LEN[vr]]
    if vr in ("DS", "IS"):  # more digits than the type has room for
        return DSfloat(float(value), auto_format=True) if vr == "DS" else IS(int(value))
    if keyword == "PatientSex":
        PatientSexValues(value)
    if vr in _PARSERS:
        _PARSERS[vr](value)
    elif vr in ("AS", "CS", "UI"):
        validate_value(vr, value, config.RAISE)
    return value


def _legal_name(form: str) -> str:
    """Return one form of a person's name, its parts separated by ^, in legal length."""
    parts = _CONTROL.sub(" ", form).split("^", _NAME_PARTS - 1)
    return "^".join([*parts[:-1], parts[-1].replace("^", " ")])[:_NAME_CHARACTERS]
