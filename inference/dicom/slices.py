"""Slices of CT as the headers of DICOM files tell them, whether a file holds one or many."""

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pydicom import Dataset

ENHANCED = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""Enhanced CT Image Storage and its legacy converted form: files of many slices."""

CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", *ENHANCED)

_MOST_FRAMES = 1 << 16  # of one file
_LARGEST_MEMBER = 4 << 30  # bytes of a file in a zip
_HOUNSFIELD = re.compile(r"(HU|HOUN|((UH|HE|US|UNSPECIFIED)?$))")  # RescaleType; US: unspecified


class SliceError(ValueError):
    """A header that tells no slice of CT; the message says why, with nothing of the patient."""


@dataclass(frozen=True, order=True)
class DicomFile:
    """A file in a folder, or in a zip.

    Attributes:
        path: of the file or the zip.
        member: its name in the zip, or "".
    """

    path: Path
    member: str = ""

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file's content, to be read and sought in.

        Raises:
            OSError, zipfile.BadZipFile: it cannot be read.
        """
        if not self.path.is_file():  # a pipe would be waited for without end
            raise OSError("not a regular file")
        if not self.member:
            with self.path.open("rb") as file:
                yield file
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            if archive.getinfo(self.member).file_size > _LARGEST_MEMBER:
                raise zipfile.BadZipFile("a file too large")
            yield file


@dataclass(frozen=True)
class Slice:
    """One slice of CT.

    Attributes:
        file, frame: where its pixels are; frames count from 0.
        uid: SOP instance UID of the file.
        number: instance number, 0 if there is none; names the slice in messages.
        rows, columns: pixels.
        position: centre of the first pixel, mm, (x, y, z) toward left, posterior, superior.
        orientation: unit vectors along a row and along a column, in the same axes.
        pixel_mm: distance between rows, and between columns.
        step_mm: distance between slices by the header, its spacing or else its thickness; or None.
        slope, intercept: HU = slope * stored value + intercept.
        bits, stored_bits, signed: of a stored value.
        acquisition: AcquisitionNumber, or None.
        patient, study, frame_of_reference: PatientID and the two UIDs, "" if absent.
    """

    file: DicomFile = field(compare=False)
    frame: int
    uid: str
    number: int
    rows: int
    columns: int
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    pixel_mm: tuple[float, ...]
    step_mm: float | None
    slope: float
    intercept: float
    bits: int
    stored_bits: int
    signed: bool
    acquisition: int | None
    patient: str
    study: str
    frame_of_reference: str

    @property
    def label(self) -> str:
        """The slice in a message."""
        frame = f", frame {self.frame + 1}" if self.frame else ""
        return f"instance {self.number}{frame}"


def text(dataset: Dataset, keyword: str) -> str:
    """An attribute's value as text, or "" where there is none that can be read."""
    try:
        return str(dataset.get(keyword) or "").strip()
    except Exception:
        return ""


def integer(dataset: Dataset, keyword: str) -> int | None:
    """An attribute's value as a whole number of no more than nine digits, or None."""
    try:
        value = int(dataset.get(keyword))
    except Exception:
        return None
    return value if abs(value) < 10**9 else None


def image_types(dataset: Dataset) -> list[str]:
    """The values of an image's type, in capitals."""
    try:
        value = dataset.get("ImageType") or ()
        return [str(part).upper() for part in ([value] if isinstance(value, str) else value)]
    except Exception:
        return []


def _whole(dataset: Dataset, keyword: str, what: str, least: int = 1) -> int:
    value = integer(dataset, keyword)
    if value is None or value < least:
        raise SliceError(f"{what} missing or wrong")
    return value


def _numbers(dataset: Dataset | None, keyword: str, count: int, what: str) -> tuple[float, ...]:
    """Finite numbers of an attribute.

    Raises:
        SliceError: there are none, or not so many.
    """
    try:
        value = dataset.get(keyword) if dataset is not None else None
        if value is None or value == "":
            raise SliceError(f"no {what}")
        numbers = tuple(map(float, [value] if count == 1 else value))
    except SliceError:
        raise
    except Exception:
        raise SliceError(f"{what} not a number") from None
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise SliceError(f"{what} missing or wrong")
    return numbers


def _group(groups: list[Dataset], keyword: str) -> Dataset | None:
    """An item of a file of many slices: its own for a slice, or else that shared by all."""
    for group in groups:
        try:
            sequence = group.get(keyword)
            if sequence:
                return sequence[0]
        except Exception:
            return None
    return None


def _rescale(dataset: Dataset | None) -> tuple[float, float]:
    slope = _numbers(dataset, "RescaleSlope", 1, "rescale slope")[0]
    intercept = _numbers(dataset, "RescaleIntercept", 1, "rescale intercept")[0]
    if slope == 0:
        raise SliceError("rescale slope 0")
    unit = text(dataset, "RescaleType")
    if not _HOUNSFIELD.match(re.sub("[^A-Z]", "", unit.upper())):
        quoted = f' "{unit}"' if re.fullmatch(r"[\w %/]{1,16}", unit, re.ASCII) else ""
        raise SliceError(f"RescaleType{quoted} is not Hounsfield units")
    return slope, intercept


def _step(dataset: Dataset | None) -> float | None:
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        try:
            step = abs(_numbers(dataset, keyword, 1, "")[0])
        except SliceError:
            continue
        if step > 0:
            return step
    return None


def slices_of(file: DicomFile, dataset: Dataset) -> list[Slice]:
    """The slices of a CT file.

    Args:
        file: where the header is from.
        dataset: the header, pixels left out.

    Raises:
        SliceError: an attribute that is needed is missing or makes no sense.
    """
    if _whole(dataset, "SamplesPerPixel", "samples per pixel") != 1:
        raise SliceError("colours, not grey values")
    if text(dataset, "PhotometricInterpretation") != "MONOCHROME2":
        raise SliceError("photometric interpretation not MONOCHROME2")
    bits = _whole(dataset, "BitsAllocated", "bits allocated")
    stored_bits = _whole(dataset, "BitsStored", "bits stored")
    if bits not in (8, 16, 32) or stored_bits > bits:
        raise SliceError(f"{stored_bits} of {bits} bits a pixel")
    high_bit = integer(dataset, "HighBit")
    if high_bit not in (None, stored_bits - 1):
        raise SliceError(f"HighBit {high_bit} does not go with BitsStored {stored_bits}")
    representation = _whole(dataset, "PixelRepresentation", "pixel representation", least=0)
    if representation > 1:
        raise SliceError("pixel representation missing or wrong")
    common = {
        "file": file,
        "uid": text(dataset, "SOPInstanceUID"),
        "number": integer(dataset, "InstanceNumber") or 0,
        "rows": _whole(dataset, "Rows", "rows"),
        "columns": _whole(dataset, "Columns", "columns"),
        "bits": bits,
        "stored_bits": stored_bits,
        "signed": bool(representation),
        "acquisition": integer(dataset, "AcquisitionNumber"),
        "patient": text(dataset, "PatientID"),
        "study": text(dataset, "StudyInstanceUID"),
        "frame_of_reference": text(dataset, "FrameOfReferenceUID"),
    }
    if not common["uid"]:
        raise SliceError("no instance UID")
    if text(dataset, "SOPClassUID") in ENHANCED:
        return _frames(dataset, common)
    if "NumberOfFrames" in dataset and integer(dataset, "NumberOfFrames") != 1:
        raise SliceError("several frames in a file of one slice")
    if "ModalityLUTSequence" in dataset:
        raise SliceError("values by a table, not by slope and intercept")
    slope, intercept = _rescale(dataset)
    return [
        Slice(
            frame=0,
            position=_numbers(dataset, "ImagePositionPatient", 3, "position"),
            orientation=_numbers(dataset, "ImageOrientationPatient", 6, "orientation"),
            pixel_mm=_numbers(dataset, "PixelSpacing", 2, "pixel spacing"),
            step_mm=_step(dataset),
            slope=slope,
            intercept=intercept,
            **common,
        )
    ]


def _frames(dataset: Dataset, common: dict) -> list[Slice]:
    """The slices of an enhanced file, by its functional groups."""
    count = _whole(dataset, "NumberOfFrames", "number of frames")
    try:
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or ())[:1]
        each = list(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    except Exception:
        raise SliceError("functional groups that cannot be read") from None
    if count != len(each) or count > _MOST_FRAMES:
        raise SliceError(f"{len(each)} functional groups for {count} frames")
    slices = []
    for frame, own in enumerate(each):
        groups = [own, *shared]
        kind = _group(groups, "CTImageFrameTypeSequence")
        if kind is not None and "LOCALIZER" in text(kind, "FrameType").upper():
            continue
        measures = _group(groups, "PixelMeasuresSequence")
        orientation = _group(groups, "PlaneOrientationSequence")
        slope, intercept = _rescale(_group(groups, "PixelValueTransformationSequence"))
        content = _group([own], "FrameContentSequence")
        acquisition = integer(content, "FrameAcquisitionNumber") if content is not None else None
        slices.append(
            Slice(
                frame=frame,
                position=_numbers(
                    _group(groups, "PlanePositionSequence"), "ImagePositionPatient", 3, "position"
                ),
                orientation=_numbers(orientation, "ImageOrientationPatient", 6, "orientation"),
                pixel_mm=_numbers(measures, "PixelSpacing", 2, "pixel spacing"),
                step_mm=_step(measures),
                slope=slope,
                intercept=intercept,
                **common | {"acquisition": acquisition},
            )
        )
    return slices
