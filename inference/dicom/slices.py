"""Read slices of CT from the headers of DICOM files, one or many per file."""

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from pydicom import Dataset

ENHANCED = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""Enhanced CT Image Storage and its legacy converted form: files of many slices."""

CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", *ENHANCED)

_MAX_FRAMES = 1 << 16  # of one file
_MAX_MEMBER = 4 << 30  # bytes of a file in a zip
_HOUNSFIELD = re.compile(r"HU|HOUN|((UH|HE|US|UNSPECIFIED)?$)")  # RescaleType, letters alone


class SliceError(ValueError):
    """A header that describes no slice of CT; the message names the attribute, not the patient."""


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
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file to read and seek in.

        Raises:
            OSError, zipfile.BadZipFile: it cannot be read.
        """
        if not self.path.is_file():  # a pipe would block
            raise OSError("not a regular file")
        if not self.member:
            with self.path.open("rb") as file:
                yield file
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            if archive.getinfo(self.member).file_size > _MAX_MEMBER:
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
        step_mm: SpacingBetweenSlices, else SliceThickness, else None.
        slope, intercept: HU = slope * stored value + intercept.
        bits, stored_bits, signed: of a stored value.
        acquisition: acquisition number, or None.
        study, frame_of_reference, patient: two UIDs and the patient's id, "" if absent.
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
    study: str
    frame_of_reference: str
    patient: str

    @property
    def label(self) -> str:
        """Name the slice in a message."""
        frame = f", frame {self.frame + 1}" if self.frame else ""
        return f"instance {self.number}{frame}"

    @property
    def byte_count(self) -> int:
        """Return the bytes of its pixels, not compressed."""
        return self.rows * self.columns * self.bits // 8


def text(dataset: Dataset, keyword: str) -> str:
    """Return an attribute's value as text, or "" if it is absent or unreadable."""
    try:
        return str(dataset.get(keyword) or "").strip()
    except Exception:
        return ""


def integer(dataset: Dataset, keyword: str) -> int | None:
    """Return an attribute's value as an integer of up to nine digits, or None."""
    try:
        value = int(dataset.get(keyword))
    except Exception:
        return None
    return value if abs(value) < 10**9 else None


def _positive(dataset: Dataset, keyword: str) -> int:
    value = integer(dataset, keyword)
    if value is None or value < 1:
        raise SliceError(f"{keyword} is missing or wrong")
    return value


def _numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...]:
    """Return an attribute's numbers.

    Raises:
        SliceError: there are more or fewer, or one is not finite.
    """
    try:
        value = dataset.get(keyword)
        numbers = tuple(map(float, [value] if count == 1 else value))
    except Exception:
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise SliceError(f"{keyword} is missing or wrong")
    return numbers


def _item(groups: list[Dataset], default: Dataset, keyword: str) -> Dataset:
    """Return the first item of the first group's sequence that has one, else the default."""
    for group in groups:
        try:
            if sequence := group.get(keyword):
                return sequence[0]
        except Exception:
            break
    return default


def _rescale(dataset: Dataset) -> tuple[float, float]:
    """Return slope and intercept to HU.

    Raises:
        SliceError: one is wrong, or they give another quantity than HU.
    """
    (slope,) = _numbers(dataset, "RescaleSlope", 1)
    (intercept,) = _numbers(dataset, "RescaleIntercept", 1)
    if slope == 0:
        raise SliceError("RescaleSlope is 0")
    unit = text(dataset, "RescaleType")
    if not _HOUNSFIELD.match(re.sub("[^A-Z]", "", unit.upper())):
        quoted = f' "{unit}"' if re.fullmatch(r"[\w %/]{1,16}", unit, re.ASCII) else ""
        raise SliceError(f"RescaleType{quoted} is not Hounsfield units")
    return slope, intercept


def _step(dataset: Dataset) -> float | None:
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        with suppress(SliceError):
            if step := abs(_numbers(dataset, keyword, 1)[0]):
                return step
    return None


def _frames(dataset: Dataset) -> tuple[list[Dataset], list[Dataset]]:
    """Return the functional groups of each frame of an enhanced file, and those of all.

    Raises:
        SliceError: they do not agree with the number of frames.
    """
    count = _positive(dataset, "NumberOfFrames")
    try:
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or ())[:1]
        each = list(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    except Exception:
        raise SliceError("functional groups cannot be read") from None
    if count != len(each) or count > _MAX_FRAMES:
        raise SliceError(f"{len(each)} functional groups for {count} frames")
    return each, shared


def slices_of(file: DicomFile, dataset: Dataset) -> list[Slice]:
    """Return the slices of a CT file.

    Args:
        file: where the header is from.
        dataset: the header, without pixels.

    Raises:
        SliceError: an attribute is missing or wrong.
    """
    for keyword, value in (("SamplesPerPixel", "1"), ("PhotometricInterpretation", "MONOCHROME2")):
        if text(dataset, keyword) != value:
            raise SliceError(f"{keyword} is not {value}")
    bits, stored_bits = _positive(dataset, "BitsAllocated"), _positive(dataset, "BitsStored")
    high_bit = integer(dataset, "HighBit")
    if bits not in (8, 16, 32) or stored_bits > bits or high_bit not in (None, stored_bits - 1):
        wrong = f"BitsAllocated {bits}, BitsStored {stored_bits} and HighBit {high_bit}"
        raise SliceError(f"{wrong} do not go together")
    signed, uid = integer(dataset, "PixelRepresentation"), text(dataset, "SOPInstanceUID")
    if signed not in (0, 1) or not uid:
        raise SliceError("PixelRepresentation or SOPInstanceUID is missing or wrong")
    enhanced = text(dataset, "SOPClassUID") in ENHANCED
    each, shared = _frames(dataset) if enhanced else ([dataset], [])
    if not enhanced and integer(dataset, "NumberOfFrames") not in (None, 1):
        raise SliceError("NumberOfFrames is not 1")
    if not enhanced and "ModalityLUTSequence" in dataset:
        raise SliceError("ModalityLUTSequence instead of RescaleSlope")
    slices = []
    for frame, own in enumerate(each):
        item = partial(_item, [own, *shared], Dataset() if enhanced else dataset)
        if "LOCALIZER" in text(item("CTImageFrameTypeSequence"), "FrameType").upper():
            continue
        measures, content = item("PixelMeasuresSequence"), item("FrameContentSequence")
        slope, intercept = _rescale(item("PixelValueTransformationSequence"))
        number = "FrameAcquisitionNumber" if enhanced else "AcquisitionNumber"
        slices.append(
            Slice(
                file=file,
                frame=frame,
                uid=uid,
                number=integer(dataset, "InstanceNumber") or 0,
                rows=_positive(dataset, "Rows"),
                columns=_positive(dataset, "Columns"),
                position=_numbers(item("PlanePositionSequence"), "ImagePositionPatient", 3),
                orientation=_numbers(
                    item("PlaneOrientationSequence"), "ImageOrientationPatient", 6
                ),
                pixel_mm=_numbers(measures, "PixelSpacing", 2),
                step_mm=_step(measures),
                slope=slope,
                intercept=intercept,
                bits=bits,
                stored_bits=stored_bits,
                signed=bool(signed),
                acquisition=integer(content, number),
                study=text(dataset, "StudyInstanceUID"),
                frame_of_reference=text(dataset, "FrameOfReferenceUID"),
                patient=text(dataset, "PatientID"),
            )
        )
    return slices
