"""Find the CT series in a folder tree or zip."""

import logging
import os
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pydicom
from pydicom import Dataset
from pydicom.uid import UID

from ..files import file_identity
from ..volume import VolumeError
from .naming import IDENTITY, digest, identifying_words, name_cases, title
from .series import Series
from .slices import (
    CT_CLASSES,
    ENHANCED,
    DicomFile,
    Slice,
    SliceError,
    integer,
    slices_of,
    text,
)

_DIRECTORY = "1.2.840.10008.1.3.10"  # an index of a disk
_READ = [
    *IDENTITY,
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality"),
    *("FrameOfReferenceUID", "SeriesNumber", "SeriesDescription", "ImageType", "InstanceNumber"),
    *("AcquisitionNumber", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *("ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
"""Attributes that are read of each file."""

_PREAMBLE = 132  # bytes, the last four of them "DICM"
_HIDDEN = (".", "__MACOSX")


@dataclass
class _Group:
    """The files of one series, those of CT and others apart."""

    number: int | None
    description: str
    folder: Path
    files: int = 0
    slices: list[Slice] = field(default_factory=list)
    refusal: str = ""


def find_series(source: Path, names: str = "number") -> tuple[list[Series], list[str]]:
    """Find the CT series among the files of a folder and those below it, of a zip, or one file.

    Links to folders are followed, each folder once. Scouts and screen captures are skipped.

    Args:
        source: folder or file.
        names: "number", "uid" or "folder", by `--names`. By "folder", names and lines identify the
            patient if the folders' names do; otherwise they do not.

    Returns:
        CT series, sorted by name, those that cannot be read with the reason; and a line for each
        other series.

    Raises:
        ValueError: the source is a zip that cannot be opened.
    """
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it quotes values
    warnings.filterwarnings("ignore", module="pydicom")
    groups: dict[tuple[str, str], _Group] = {}
    identifying: dict[str, set[str]] = {}  # words by series, of its skipped files too
    unreadable = not_dicom = 0
    for file in _files(source):
        try:
            header = _header(file)
            if header is None:
                not_dicom += 1
                continue
            uid, kind = text(header, "SeriesInstanceUID"), text(header, "SOPClassUID")
            if kind == _DIRECTORY:
                continue
            if not uid or not kind:
                raise SliceError("SeriesInstanceUID or SOPClassUID is missing")
        except Exception:
            unreadable += 1
            continue
        key = uid, _why_not_ct(header, kind)
        if key not in groups:
            number, description = integer(header, "SeriesNumber"), text(header, "SeriesDescription")
            groups[key] = _Group(number, description, _folder(file, source))
        groups[key].files += 1
        if not key[1]:
            _add_slices(groups[key], file, header)
        identifying.setdefault(uid, set()).update(identifying_words(header))
    everybody = set().union(*identifying.values())
    series, skipped = [], []
    for (uid, why), group in groups.items():
        # Names depend on their series alone, lines may depend on all.
        words = everybody if why else identifying[uid]
        name = title(group.number, group.description, group.folder, words, names)
        if why:
            skipped.append(f"series {name}_{digest(uid, names)} ({_count(group.files)}): {why}")
        else:
            series += _series_of(group, Series(name, uid, group.slices, group.refusal))
    if not_dicom:
        skipped.append(f"{_count(not_dicom)}, not DICOM")
    name_cases(series, names)
    if unreadable:
        refusal = f"{_count(unreadable)} cannot be read as DICOM"
        series.append(Series("unreadable", "", refusal=refusal))
    series.sort(key=lambda one: one.name)
    _note_single_slices(series)
    return series, skipped


def _count(files: int) -> str:
    return "1 file" if files == 1 else f"{files} files"


def _folder(file: DicomFile, source: Path) -> Path:
    """Return a file's folder, relative to the source unless it is the source."""
    folder = (file.path / file.member).parent
    below = folder.is_relative_to(source) and folder != source
    return folder.relative_to(source) if below else Path(folder.name)


def _files(source: Path) -> Iterator[DicomFile]:
    """Yield the files of a folder tree, of zips in it, or one file; in order.

    Raises:
        ValueError: the source is a zip that cannot be opened.
    """
    if not source.is_dir():
        yield from _files_in(source)
        return
    failed: list[OSError] = []
    seen = {file_identity(source)}
    for folder, folders, names in os.walk(source, onerror=failed.append, followlinks=True):
        for name in sorted(folders):
            identity = file_identity(Path(folder, name))
            if name.startswith(_HIDDEN) or identity in seen:
                folders.remove(name)
            seen.add(identity)
        folders.sort()
        for path in (Path(folder, name) for name in sorted(names) if name[0] != "."):
            try:
                yield from _files_in(path)
            except ValueError:
                yield DicomFile(path)  # one file more that is not DICOM
    for error in failed:
        yield DicomFile(Path(error.filename))  # a folder: not readable as a file either


def _files_in(path: Path) -> Iterator[DicomFile]:
    """Yield a file, or the files in it if it is a zip."""
    if path.suffix.lower() != ".zip" or not path.is_file():
        yield DicomFile(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(member.filename for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"a zip that cannot be opened ({type(error).__name__})") from None
    for member in members:
        if member[-1] != "/" and not any(part.startswith(_HIDDEN) for part in member.split("/")):
            yield DicomFile(path, member)


def _header(file: DicomFile) -> Dataset | None:
    """Return what is needed of a file's header, or None if the file is not DICOM.

    Raises:
        Exception: whatever pydicom raises at a damaged header.
    """
    with file.open() as stream:
        start = stream.read(_PREAMBLE)
        if start[128:] != b"DICM" and not _is_first_element(start[:8]):
            return None
        stream.seek(0)
        return pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_READ, force=True)


def _is_first_element(start: bytes) -> bool:
    """Check for an element of group 2 or 8, with which a file without preamble begins."""
    if len(start) < 8 or start[:2] not in (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08"):
        return False
    (length,) = struct.unpack("<I" if start[1] == 0 else ">I", start[4:])
    return length < 1 << 16 or (start[4:6].isalpha() and start[4:6].isupper())  # or a VR


def _why_not_ct(header: Dataset, kind: str) -> str:
    """Return why a file is no slice of a CT series, or ""."""
    if kind not in CT_CLASSES:
        name = UID(kind).name
        return "of an unknown kind, not CT" if name == kind else f"{name}, not CT"
    if text(header, "Modality") not in ("CT", ""):
        return "not of modality CT"
    if "LOCALIZER" in text(header, "ImageType").upper():
        return "a scout (localizer)"
    if kind not in ENHANCED and "ImagePositionPatient" not in header:
        return "no ImagePositionPatient, such as a screen capture"
    return ""


def _add_slices(group: _Group, file: DicomFile, header: Dataset) -> None:
    """Add a file's slices to its series, or the reason why it has none."""
    try:
        group.slices += slices_of(file, header)
    except SliceError as error:
        reason = str(error)
        if identifying_words(header) & set(re.split(r"\W+", reason.lower())):
            reason = "an attribute has a wrong value"
        reason = f"instance {integer(header, 'InstanceNumber')}: {reason}"
        group.refusal = group.refusal or reason


def _series_of(group: _Group, whole: Series) -> list[Series]:
    """Return a series as one case, or as several where each of its acquisitions is a volume."""
    unique: dict[tuple[str, int], Slice] = {}
    for one in group.slices:
        if unique.setdefault((one.uid, one.frame), one) != one and not whole.refusal:
            whole.refusal = f"slices that differ have the same SOPInstanceUID: {one.label}"
    whole.slices = list(unique.values())
    if (copies := len(group.slices) - len(unique)) and not whole.refusal:
        whole.notes.append(f"{_count(copies)} skipped: copies of others")
    if not unique and not whole.refusal:
        whole.refusal = "it has no slices"
    _check_one_patient(whole)
    by_number = sorted(whole.slices, key=lambda one: one.acquisition or 0)
    parts = [
        Series(whole.name, whole.uid, list(slices), part=str(abs(number)), notes=[*whole.notes])
        for number, slices in groupby(by_number, key=lambda one: one.acquisition or 0)
    ]
    if whole.refusal or len(parts) < 2 or len(whole.slices) < 3 * len(parts):
        return [whole]
    try:
        order = [number for number, _ in groupby(one.acquisition for one in whole.stack.slices)]
    except VolumeError:
        try:
            return [part for part in parts if part.stack]
        except VolumeError:
            return [whole]
    if len(order) > len(set(order)):
        shown = " and ".join(f"{part.part} ({len(part.slices)} slices)" for part in parts)
        whole.notes.append(f"acquisitions {shown} are interleaved in one volume")
    return [whole]


def _check_one_patient(series: Series) -> None:
    """Refuse slices of several studies, frames of reference or patients under one series UID.

    Where every slice has its own the reason is an anonymiser: a note.
    """
    names = {"study": "studies", "frame_of_reference": "frames of reference", "patient": "patients"}
    for what, name in names.items():
        counts = Counter(filter(None, (getattr(one, what) for one in series.slices))).values()
        if len(counts) == len(series.slices) > 2:
            series.notes.append(f"as many {name} as slices, as an anonymiser makes them: ignored")
        elif len(counts) > 1 and not series.refusal:
            shown = " and ".join(map(str, sorted(counts, reverse=True)))
            series.refusal = f"{len(counts)} {name} in one series: {shown} slices"


def _note_single_slices(series: list[Series]) -> None:
    """Note that an anonymiser may have given every slice a series UID of its own."""
    alike: dict[object, list[Series]] = {}
    for one in series:
        if len(one.slices) == 1:
            first = one.slices[0]
            key = first.patient, first.rows, first.columns, first.orientation, first.pixel_mm
            alike.setdefault(key, []).append(one)
    for found in alike.values():
        if len(found) > 2:
            found[0].notes.append(
                f"{len(found)} series of one slice each, same patient and grid: an anonymiser may "
                "have given every slice a series UID of its own"
            )
